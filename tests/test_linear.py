"""Log-probabilities from hidden states: the same as from logits, in value and gradient."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx._head import tiling
from dpo_eqx._head.collisions import linear_collisions

from .policies import add_bias, assert_close

VOCAB, WIDTH = 16, 5


def example(shape=(2, 7), vocab=VOCAB, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 5)
    operands = (
        jax.random.normal(keys[0], (*shape, WIDTH), dtype),
        jax.random.normal(keys[1], (vocab, WIDTH), dtype),
        jax.random.normal(keys[2], (vocab,), dtype),
    )
    targets = jax.random.randint(keys[3], shape, 0, vocab)
    return operands, targets, jax.random.normal(keys[4], shape, dtype)


def from_logits(hidden, unembedding, bias, targets, softcap):
    logits = hidden @ unembedding.T
    logits = add_bias(logits, bias)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return dpx.token_log_probs(logits, targets)


def objectives(targets, slopes, softcap, **options):
    """The two ways as scalar functions of all their operands."""

    def plain(hidden, unembedding, bias):
        return (slopes * from_logits(hidden, unembedding, bias, targets, softcap)).sum()

    def chunked(hidden, unembedding, bias):
        log_probs = dpx.linear_token_log_probs(
            hidden, unembedding, targets, bias=bias, softcap=softcap, **options
        )
        return (slopes * log_probs).sum()

    return plain, chunked


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Parts of the vocabulary of two rows or so, where tokens come in chunks of two."""
    monkeypatch.setitem(tiling.LOGITS_AT_ONCE, "cpu", 4)


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7, 14, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_chunk_size_gives_the_same_value_and_gradient(chunk_size, softcap):
    check_chunks(chunk_size, softcap)


@pytest.mark.parametrize(("chunk_size", "softcap"), [(None, 2.0), (2, None), (5, None)])
def test_every_part_of_the_vocabulary_counts(tiny_tiles, chunk_size, softcap):
    check_chunks(chunk_size, softcap)


def check_chunks(chunk_size, softcap):
    operands, targets, slopes = example()
    plain, chunked = objectives(targets, slopes, softcap, chunk_size=chunk_size)
    want = jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(*operands)
    assert_close(jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(*operands), want, 1e-13)


@pytest.mark.parametrize(
    ("shape", "vocab"),
    [
        pytest.param((1,), 1, marks=pytest.mark.slow),
        pytest.param((1, 1), 9, marks=pytest.mark.slow),
        ((3, 1, 2), 2),
    ],
)
def test_small_shapes(shape, vocab):
    (hidden, unembedding, _), targets, slopes = example(shape, vocab)
    plain, chunked = objectives(targets, slopes, None, chunk_size=2)
    operands = (hidden, unembedding, None)
    assert_close(
        jax.value_and_grad(chunked, (0, 1))(*operands),
        jax.value_and_grad(plain, (0, 1))(*operands),
        1e-13,
    )


VALUES = jax.random.normal(jax.random.key(9), (64,), jnp.float64)


def directions(operands):
    return jax.tree.map(lambda x: jnp.resize(VALUES, x.shape), operands)


def derivatives(function, *operands):
    """In forward mode, and of second order: forward over reverse, and each of the others."""
    along = directions(operands)

    def squares(*operands):
        return (function(*operands) ** 2).sum()

    def gradient(*operands):
        return jax.grad(squares, (0, 1, 2))(*operands)

    def slope(*operands):
        return sum(map(jnp.vdot, gradient(*operands), along))

    def pushed(*operands):
        return jax.jvp(squares, operands, along)[1]

    return (
        jax.jvp(function, operands, along)[1],
        jax.jvp(gradient, operands, along)[1],
        jax.grad(slope, (0, 1, 2))(*operands),
        jax.grad(pushed, (0, 1, 2))(*operands),
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((11, 2.0, 2), id="overlap", marks=pytest.mark.slow),
        pytest.param((16, None, None), id="whole"),
    ],
)
def test_every_mode_and_order_at_slopes_of_zero(tiny_tiles, settings):
    vocab, softcap, chunk_size = settings
    operands, targets, _ = example((5,), vocab)
    start = from_logits(*operands, targets, softcap)
    # The third is padding, with a hidden state and a target that are none.
    mask = jnp.arange(5) != 2
    spoiled = operands[0].at[2].set(jnp.nan), *operands[1:]
    bad_targets = targets.at[2].set(-1)

    def plain(*operands):
        return jnp.where(mask, from_logits(*operands, targets, softcap) - start, 0)

    def ours(*operands):
        got = dpx.linear_token_log_probs(
            operands[0],
            operands[1],
            bad_targets,
            bias=operands[2],
            softcap=softcap,
            chunk_size=chunk_size,
        )
        return jnp.where(mask, got - start, 0)

    want = jax.jit(partial(derivatives, plain))(*operands)
    assert np.abs(want[1][1]).max() > 0.1
    got = jax.jit(partial(derivatives, ours))(*spoiled)
    assert_close(got, want, 1e-11)


def test_linearize_of_the_hidden_states_alone(tiny_tiles):
    (hidden, head, _), targets, _ = example((3,))

    @jax.jit
    def both(hidden, along):
        got = jax.linearize(lambda h: dpx.linear_token_log_probs(h, head, targets), hidden)[1]
        want = jax.jvp(lambda h: from_logits(h, head, None, targets, None), (hidden,), (along,))
        return got(along), want[1]

    np.testing.assert_allclose(*both(hidden, hidden**2), rtol=1e-12)


@pytest.mark.parametrize("vocab", [7, 31, 32003, 50257, 32008, 151936])
def test_parts_of_any_vocabulary_are_of_about_the_size_that_is_wanted(vocab):
    for most in (1, 100, 4096, 12000):
        wanted = most * vocab / tiling.LOGITS_AT_ONCE["cpu"]
        chosen = tiling.tiling_for((most,), most, vocab)("cpu")
        assert chosen.chunks(jnp.zeros((most, 1))).shape == (1, most, 1)
        assert chosen.parts <= max(1, 1.6 * wanted)
        assert vocab / chosen.parts <= 1.6 * vocab / max(1, wanted)


@pytest.mark.parametrize("vocab", [7, 31, 8 * 13, 32003])
def test_a_last_part_that_overlaps(monkeypatch, vocab):
    monkeypatch.setitem(tiling.LOGITS_AT_ONCE, "cpu", 5 * vocab // 3)
    operands, targets, slopes = example((5,), vocab)
    targets = targets.at[0].set(vocab - 1)
    assert tiling.tiling_for((5,), None, vocab)("cpu").parts == 3
    plain, chunked = objectives(targets, slopes, 2.0)
    want = jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(*operands)
    assert_close(jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(*operands), want, 1e-12)


@pytest.mark.slow
def test_a_symbolic_number_of_rows():
    (hidden, head, _), targets, _ = example((3, 4))
    (rows,) = jax.export.symbolic_shape("rows")
    shapes = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in (hidden, targets)]

    def run(hidden, targets):
        return dpx.linear_token_log_probs(hidden, head, targets, chunk_size=3)

    exported = jax.export.export(jax.jit(run))(*shapes)
    for n in (1, 2, 3):
        want = run(hidden[:n], targets[:n])
        np.testing.assert_allclose(exported.call(hidden[:n], targets[:n]), want, rtol=1e-13)


@pytest.mark.slow  # compiles derivatives of derivatives
def test_both_modes_of_both_orders(tiny_tiles):
    operands, targets, slopes = example((3,))
    _, chunked = objectives(targets, slopes, 2.0, chunk_size=2)
    jax.test_util.check_grads(jax.jit(chunked), operands, order=2, modes=("fwd", "rev"))


@pytest.mark.slow
def test_under_vmap_scan_and_remat():
    operands, targets, slopes = example()
    plain, chunked = objectives(targets[0], slopes[0], 2.0, chunk_size=3)
    (hidden, *head) = operands
    want = jnp.stack([plain(h, *head) for h in hidden])
    np.testing.assert_allclose(jax.vmap(lambda h: chunked(h, *head))(hidden), want, rtol=1e-13)
    scanned = jax.lax.map(jax.checkpoint(lambda h: chunked(h, *head)), hidden)
    np.testing.assert_allclose(scanned, want, rtol=1e-13)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_masked_token_with_a_bad_hidden_state_contributes_nothing(bad):
    (hidden, *head), targets, _ = example((5,))
    mask = jnp.arange(5) != 2
    spoiled = hidden.at[2, 1].set(bad)

    def masked(hidden, *head):
        log_probs = dpx.linear_token_log_probs(hidden, head[0], targets, bias=head[1])
        return dpx.sequence_log_probs(log_probs, mask)

    gradient = jax.jit(jax.value_and_grad(masked, (0, 1, 2)))
    assert_close(gradient(spoiled, *head), gradient(hidden, *head), 1e-15)
    assert np.isnan(dpx.linear_token_log_probs(spoiled, head[0], targets)[2])


def test_logits_of_either_infinity(tiny_tiles):
    (hidden, unembedding, _), targets, _ = example((3,))
    bias = jnp.zeros(VOCAB).at[:-1].set(-jnp.inf)
    got = dpx.linear_token_log_probs(hidden, unembedding, jnp.full(3, VOCAB - 1), bias=bias)
    np.testing.assert_array_equal(got, 0)
    for bias in (jnp.full(VOCAB, -jnp.inf), jnp.zeros(VOCAB).at[3].set(jnp.inf)):
        got = dpx.linear_token_log_probs(hidden, unembedding, targets, bias=bias)
        assert np.isnan(got).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("vocab", [32768, 32749], ids=["even", "prime"])
def test_memory_does_not_grow_with_the_logits(dtype, vocab):
    tokens, width = 2048, 16
    shapes = [(tokens, width), (vocab, width)]
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def total(hidden, unembedding, targets):
        return dpx.linear_token_log_probs(hidden, unembedding, targets).sum()

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(*operands, targets).compile()
    logits = 4 * tokens * vocab
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 5


def test_a_narrow_unembedding_is_widened_part_by_part():
    tokens, vocab, width = 1024, 32768, 512
    operands = [jax.ShapeDtypeStruct((n, width), jnp.bfloat16) for n in (tokens, vocab)]
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    compiled = jax.jit(dpx.linear_token_log_probs).lower(*operands, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * vocab * width / 2


def test_targets_outside_the_vocabulary_are_nan():
    (hidden, unembedding, _), targets, _ = example((3,))
    got = dpx.linear_token_log_probs(hidden, unembedding, targets.at[1].set(VOCAB))
    np.testing.assert_array_equal(np.isnan(got), [False, True, False])
    assert np.isnan(dpx.linear_token_log_probs(hidden, unembedding, targets - VOCAB)).all()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-6)])
def test_narrow_inputs_are_summed_in_float32(dtype, bound):
    (hidden, unembedding, bias), targets, _ = example(dtype=dtype)
    got = dpx.linear_token_log_probs(hidden, unembedding, targets, bias=bias, chunk_size=3)
    assert got.dtype == jnp.float32
    wide = (x.astype(jnp.float64) for x in (hidden, unembedding, bias))
    # The products are exact in float32 for bfloat16 operands: the same bound holds for both.
    assert_close(got.astype(jnp.float64), from_logits(*wide, targets, None), bound)


def test_collisions_are_the_sum_of_squared_probabilities(tiny_tiles):
    (hidden, unembedding, bias), _, _ = example()
    got = linear_collisions(hidden, unembedding, bias=bias, softcap=2.0, chunk_size=3)
    probs = jax.nn.softmax(2 * jnp.tanh(add_bias(hidden @ unembedding.T, bias) / 2))
    np.testing.assert_allclose(got, jnp.log((probs**2).sum(-1)), rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": jnp.zeros((2, 6), int)}, r"got \(2, 7, 5\) and \(2, 6\)"),
        ({"unembedding": jnp.zeros((VOCAB, 4))}, r"width of `hidden`, 5; got \(16, 4\)"),
        ({"chunk_size": 0}, "`chunk_size` must be positive or None, got 0"),
        ({"softcap": -1.0}, "`softcap` must be a positive number or None, got -1.0"),
    ],
)
def test_bad_input(unchecked, change, message):
    (hidden, unembedding, _), targets, _ = example()
    good = {"hidden": hidden, "unembedding": unembedding, "targets": targets}
    with pytest.raises(ValueError, match=message):
        dpx.linear_token_log_probs(**good | change)


class TestShardedVocabulary:
    """The vocabulary over `tensor`, the tokens over `data`; wherever the gradient is taken."""

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = (P("data"), P("tensor"), P("tensor"))
    operands, targets, slopes = example((4, 7))
    over_tensor = staticmethod(
        partial(dpx.linear_token_log_probs, chunk_size=3, axis_name="tensor")
    )

    @property
    def want(self):
        plain, _ = objectives(self.targets, self.slopes, 2.0)
        return jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(*self.operands)

    def local(self, hidden, unembedding, bias, targets, slopes):
        log_probs = self.over_tensor(hidden, unembedding, targets, bias=bias, softcap=2.0)
        return (slopes * log_probs).sum()

    @pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_gradient_inside(self, check_vma):
        def inside(hidden, *rest):
            # The parameters vary over `data` from here on, as `make_grad` sees to.
            head, data = jax.lax.pcast(rest[:2], "data", to="varying"), rest[2:]
            value, slopes = jax.value_and_grad(self.local, (0, 1, 2))(hidden, *head, *data)
            value, in_head = jax.lax.psum((value, slopes[1:]), "data")
            return value, (slopes[0], *in_head)

        mapped = jax.shard_map(
            inside,
            mesh=self.mesh,
            in_specs=(*self.specs, P("data"), P("data")),
            out_specs=(P(), self.specs),
            check_vma=check_vma,
        )
        got = jax.jit(mapped)(*self.operands, self.targets, self.slopes)
        assert_close(got, self.want, 1e-13)

    def test_gradient_from_outside(self):
        def outside(*operands):
            total = jax.shard_map(
                lambda *xs: jax.lax.psum(self.local(*xs), "data"),
                mesh=self.mesh,
                in_specs=(*self.specs, P("data"), P("data")),
                out_specs=P(),
            )
            return total(*operands, self.targets, self.slopes)

        got = jax.jit(jax.value_and_grad(outside, (0, 1, 2)))(*self.operands)
        assert_close(got, self.want, 1e-13)

    def test_a_target_on_no_device_is_nan(self):
        got = jax.shard_map(
            self.over_tensor,
            mesh=self.mesh,
            in_specs=(P("data"), P("tensor"), P("data")),
            out_specs=P("data"),
        )(*self.operands[:2], self.targets.at[0, 0].set(VOCAB))
        assert np.isnan(got[0, 0])
        assert np.isfinite(got).sum() == self.targets.size - 1
