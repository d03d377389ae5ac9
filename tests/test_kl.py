"""KL over the whole vocabulary: chunked as from all logits, in value and gradient, sharded too."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx._head import tiling

from .policies import Attention, Perceptron, Plain, add_bias, assert_close, random_batch

VOCAB, WIDTHS = 16, (5, 3)


def example(shape=(2, 7), vocab=VOCAB, dtype=jnp.float64):
    """Hidden states, unembedding and bias of the policy, then of the reference; and slopes."""
    keys = iter(jax.random.split(jax.random.key(0), 7))
    sides = [
        jax.random.normal(next(keys), size, dtype)
        for width in WIDTHS
        for size in ((*shape, width), (vocab, width), (vocab,))
    ]
    return sides, jax.random.normal(next(keys), shape, dtype)


def brute_force(logits, reference_logits):
    """By the definition, in float64 NumPy."""

    def softmax(x):
        x = np.asarray(x, np.float64)
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    p, q = softmax(logits), softmax(reference_logits)
    return (p * np.log(p / q)).sum(axis=-1)


def logits_of(hidden, unembedding, bias, softcap):
    logits = hidden @ unembedding.T
    logits = add_bias(logits, bias)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@partial(jax.jit, static_argnames="softcaps")
def plain(hidden, head, bias, other, other_head, other_bias, softcaps=(None, None)):
    ours = logits_of(hidden, head, bias, softcaps[0])
    return dpx.token_kl(ours, logits_of(other, other_head, other_bias, softcaps[1]))


@partial(jax.jit, static_argnames=("softcaps", "chunk_size", "axis_name"))
def chunked(hidden, head, bias, other, other_head, other_bias, softcaps=(None, None), **options):
    options |= {"bias": bias, "reference_bias": other_bias}
    options |= {"softcap": softcaps[0], "reference_softcap": softcaps[1]}
    return dpx.linear_kl(hidden, head, other, other_head, **options)


def test_token_kl_is_the_definition():
    sides, _ = example()
    ours, theirs = (
        np.asarray(hidden) @ np.asarray(head).T + np.asarray(bias)
        for hidden, head, bias in (sides[:3], sides[3:])
    )
    want = brute_force(ours, theirs)
    assert want.min() > 0.01
    np.testing.assert_allclose(dpx.token_kl(ours, theirs), want, rtol=1e-13)
    np.testing.assert_allclose(chunked(*sides, chunk_size=3), want, rtol=1e-12)
    assert np.abs(want - brute_force(theirs, ours)).max() > 0.1, "the direction matters"


def test_tokens_that_are_excluded():
    one, other = jnp.array([0.0, 1.0, -jnp.inf]), jnp.array([1.0, 0.0, -jnp.inf])
    want = brute_force(one[:2], other[:2])
    value, slopes = jax.value_and_grad(dpx.token_kl, (0, 1))(one, other)
    np.testing.assert_allclose(value, want, rtol=1e-14)
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert dpx.token_kl(jnp.zeros(3), other) == np.inf
    assert np.isnan(dpx.token_kl(jnp.full(3, jnp.nan), other))


@pytest.mark.parametrize(
    "softcaps", [(None, None), pytest.param((2.0, None), marks=pytest.mark.slow), (1.0, 3.0)]
)
def test_every_chunk_size_gives_the_same_value_and_gradient(softcaps):
    sides, slopes = example()

    def values_and_gradients(*sides):
        def of(function):
            def objective(*sides):
                return (slopes * function(*sides, softcaps=softcaps)).sum()

            return jax.value_and_grad(objective, range(6))(*sides)

        # Of those without a remainder, too; with both softcaps one will do.
        sizes = (4,) if None not in softcaps else (None, 1, 4, 7, 1000)
        return of(plain), [of(partial(chunked, chunk_size=size)) for size in sizes]

    want, results = jax.jit(values_and_gradients)(*sides)
    for got in results:
        assert_close(got, want, 1e-12)


def test_parts_of_the_vocabulary(monkeypatch):
    """Eleven tokens in parts of three: the last part overlaps the one before."""
    monkeypatch.setitem(tiling.LOGITS_AT_ONCE, "cpu", 6)
    sides, slopes = example((3,), vocab=11)

    def of(function):
        return jax.value_and_grad(lambda *x: (slopes * function(*x)).sum(), range(6))(*sides)

    # No size of a chunk that another test has compiled with other parts.
    assert tiling.tiling_for((3,), 2, 11)("cpu").parts == 4
    assert_close(of(partial(chunked, chunk_size=2)), of(plain), 1e-12)


@pytest.mark.parametrize("at_once", [4, 2**21])
def test_an_excluded_token_is_infinitely_far_however_improbable(monkeypatch, at_once):
    """The share of the excluded token underflows, in whatever order the parts come."""
    monkeypatch.setitem(tiling.LOGITS_AT_ONCE, "cpu", at_once)
    head = jnp.array([-1e4, 0.0, 1.0, 1e4])[:, None]
    bias = jnp.array([-jnp.inf, 0, 0, 0])
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        sides = jnp.ones((1, 1)), head[jnp.array(order)], None, jnp.ones((1, 1)), head[:4] * 0
        got = jax.jit(lambda *x: dpx.linear_kl(x[0], x[1], x[3], x[4], reference_bias=x[5]))(
            *sides, bias[jnp.array(order)]
        )
        assert got == np.inf
        assert np.isfinite(dpx.linear_kl(sides[0], sides[1], sides[3], sides[4])).all()


@pytest.mark.slow  # compiles derivatives of derivatives
def test_reverse_mode_of_both_orders():
    sides, slopes = example((2,), vocab=4)

    @jax.jit
    def objective(*sides):
        return (slopes * chunked(*sides, softcaps=(2.0, None), chunk_size=1)).sum()

    jax.test_util.check_grads(objective, sides, order=2, modes=("rev",))


@jax.jit
def without_the_third(*sides):
    """The KL of all tokens but one, summed, and its gradient."""
    mask = jnp.arange(5) != 2
    return jax.value_and_grad(lambda *s: dpx.sequence_log_probs(chunked(*s), mask), range(6))(
        *sides
    )


@pytest.mark.parametrize("side", [0, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_masked_token_with_a_bad_hidden_state_contributes_nothing(bad, side):
    sides, _ = example((5,))
    spoiled = [x.at[2, 1].set(bad) if i == side else x for i, x in enumerate(sides)]
    assert_close(without_the_third(*spoiled), without_the_third(*sides), 1e-15)
    assert np.isnan(chunked(*spoiled)[2])


def test_narrow_inputs_are_summed_in_float32():
    sides, _ = example(dtype=jnp.bfloat16)
    got = chunked(*sides, chunk_size=3)
    assert got.dtype == jnp.float32
    wide = [x.astype(jnp.float64) for x in sides]
    assert_close(got.astype(jnp.float64), plain(*wide), 2e-6)


def test_no_array_holds_all_logits():
    """Neither forward nor backward: the largest array is a chunk of logits or the unembedding."""
    sides, _ = example((64,), vocab=512)

    def objective(*sides):
        return chunked(*sides, chunk_size=2).sum()

    text = jax.jit(jax.grad(objective, (0, 1, 3, 4))).lower(*sides).as_text()
    assert "x512xf64" in text
    assert "64x512x" not in text
    assert "32x2x512x" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_hidden": jnp.zeros((6, 3))}, r"same tokens, .* got \(7, 5\) and \(6, 3\)"),
        ({"reference_unembedding": jnp.zeros((9, 3))}, "one vocabulary; got 16 and 9 tokens"),
        ({"unembedding": jnp.zeros((16, 4))}, r"width of `hidden`, 5; got \(16, 4\)"),
        ({"reference_unembedding": jnp.zeros(16)}, r"width of `reference_hidden`, 3; got \(16,\)"),
        ({"chunk_size": 0}, "`chunk_size` must be positive or None, got 0"),
        ({"reference_softcap": 0}, "`reference_softcap` must be a positive number or None, got 0"),
    ],
)
def test_bad_input(unchecked, change, message):
    (hidden, head, _, other, other_head, _), _ = example((7,))
    good = {"hidden": hidden, "unembedding": head}
    good |= {"reference_hidden": other, "reference_unembedding": other_head}
    with pytest.raises(ValueError, match=message):
        dpx.linear_kl(**good | change)


@pytest.fixture(scope="module")
def want():
    """The value and gradient that every way over devices must have."""
    sharded = TestShardedVocabulary

    def objective(*sides):
        return (sharded.slopes * plain(*sides, softcaps=sharded.softcaps)).sum()

    return jax.jit(jax.value_and_grad(objective, range(6)))(*sharded.sides)


class TestShardedVocabulary:
    """Both vocabularies over `tensor`, the tokens over `data`; wherever the gradient is taken."""

    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = (P("data"), P("tensor"), P("tensor")) * 2
    sides, slopes = example((4, 7))
    softcaps = (2.0, None)

    def local(self, *operands):
        *sides, slopes = operands
        options = {"softcaps": self.softcaps, "chunk_size": 3, "axis_name": "tensor"}
        return (slopes * chunked(*sides, **options)).sum()

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_gradient_inside(self, check_vma, want):
        def inside(*operands):
            # The parameters vary over `data` from here on, as `make_grad` sees to.
            is_head = [i % 3 > 0 for i in range(6)] + [False]
            operands = [
                jax.lax.pcast(x, "data", to="varying") if head else x
                for x, head in zip(operands, is_head, strict=True)
            ]
            value, slopes = jax.value_and_grad(self.local, range(6))(*operands)
            slopes = [
                jax.lax.psum(x, "data") if head else x
                for x, head in zip(slopes, is_head, strict=False)
            ]
            return jax.lax.psum(value, "data"), tuple(slopes)

        mapped = jax.shard_map(
            inside,
            mesh=self.mesh,
            in_specs=(*self.specs, P("data")),
            out_specs=(P(), self.specs),
            check_vma=check_vma,
        )
        assert_close(jax.jit(mapped)(*self.sides, self.slopes), want, 1e-12)

    def test_gradient_from_outside(self, want):
        def outside(*sides):
            return jax.shard_map(
                lambda *xs: jax.lax.psum(self.local(*xs), "data"),
                mesh=self.mesh,
                in_specs=(*self.specs, P("data")),
                out_specs=P(),
            )(*sides, self.slopes)

        got = jax.jit(jax.value_and_grad(outside, range(6)))(*self.sides)
        assert_close(got, want, 1e-12)


FAST = Attention(jax.random.key(0)), Attention(jax.random.key(1), width=6, softcap=None)
ROADS = {
    "fast": FAST,
    "plain": tuple(map(Plain, FAST)),
    "mixed": (FAST[0], Plain(FAST[1])),
    "mixed the other way": (Plain(FAST[0]), FAST[1]),
}


@pytest.fixture(scope="module")
def wanted():
    """By hand, for each pair and side: KL at each scored token, and the log-ratio of each."""
    run = eqx.filter_jit(lambda model, ids: jax.nn.log_softmax(model(ids)))
    batch, found = TestCompare.batch, []
    for i in range(batch.pairs):
        prompt = batch.prompt.ids[i][batch.prompt.mask[i]]
        for side in (batch.chosen, batch.rejected):
            text = np.concatenate([prompt, side.ids[i][side.mask[i]]])
            # Padded to one length, for one compilation: what comes later has no influence.
            ids = np.pad(text, (0, 11 - text.size))
            here = slice(prompt.size - 1, text.size - 1)
            ours, theirs = (np.asarray(run(model, ids))[here] for model in FAST)
            places = np.arange(text.size - prompt.size), text[prompt.size :]
            found.append((brute_force(ours, theirs), ours[places] - theirs[places]))
    return found


class TestCompare:
    """Policy and reference on a ragged batch, by every road, against loops over rows."""

    batch = random_batch()
    compare = staticmethod(eqx.filter_jit(dpx.compare))

    @pytest.mark.parametrize("road", ROADS)
    def test_equals_loops_over_rows_and_positions(self, road, wanted):
        policy, reference = ROADS[road]
        got = self.compare(policy, reference, self.batch)
        kl = [float(kl.sum()) for kl, _ in wanted]
        np.testing.assert_allclose(got.chosen_kl, kl[::2], rtol=1e-11)
        np.testing.assert_allclose(got.rejected_kl, kl[1::2], rtol=1e-11)
        for tokens, ratios in (
            (got.chosen_tokens, wanted[::2]),
            (got.rejected_tokens, wanted[1::2]),
        ):
            for row, (_, want) in zip(tokens, ratios, strict=True):
                np.testing.assert_allclose(row[: want.size], want, rtol=1e-9, atol=1e-12)
                assert not row[want.size :].any()

    def test_log_probabilities_are_those_of_score_pairs(self):
        got = self.compare(*FAST, self.batch)
        for model, log_probs in zip(FAST, (got.policy, got.reference), strict=True):
            assert_close(log_probs, eqx.filter_jit(dpx.score_pairs)(model, self.batch), 1e-12)

    def test_a_policy_beside_itself(self):
        got = self.compare(FAST[0], FAST[0], self.batch)
        assert np.abs(got.chosen_kl).max() < 1e-12
        assert not got.chosen_tokens.any()

    def test_vocabularies_that_differ(self):
        class Wide(eqx.Module):
            def __call__(self, ids):
                return jnp.zeros((ids.size, 12))

        with pytest.raises(ValueError, match="one vocabulary; got logits of 11 and 12 tokens"):
            self.compare(Perceptron(jax.random.key(0)), Wide(), self.batch)
