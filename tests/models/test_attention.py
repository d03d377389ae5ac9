"""Attention and rotation against float64 NumPy written from their definitions."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from dpo_eqx import Layout, PackedLayout, models
from dpo_eqx.models._decoder import attended, attention, blockwise, rotary
from dpo_eqx.models._decoder.attention import attend, attend_by_layout, masks

CONFIG = models.Config(vocab=1, width=1, layers=1, heads=4, key_heads=2, head_width=6)
LAYOUT = Layout(jnp.asarray(5), 7, (4, 4, 3))


def draw(length, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(length, heads, 6)), dtype) for heads in (4, 2, 2)]


def oracle(query, key, value, mask, scale, softcap):
    """One head after the other, one query after the other."""
    output = np.zeros(query.shape)
    for head in range(query.shape[1]):
        shared = head // (query.shape[1] // key.shape[1])
        for i in range(query.shape[0]):
            scores = scale * key[mask[i], shared] @ query[i, head]
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max())
            output[i, head] = weights @ value[mask[i], shared] / weights.sum()
    return output


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(jnp.float64, 1e-13), pytest.param(jnp.float32, 1e-6, marks=pytest.mark.slow)],
)
def test_by_layout(window, softcap, dtype, bound):
    config = dataclasses.replace(CONFIG, attention_softcap=softcap)
    row = draw(LAYOUT.length, dtype)
    got = attend_by_layout(LAYOUT, *row, masks(LAYOUT, window), config=config, rng=None)
    positions = np.asarray(LAYOUT.positions)
    near = positions[:, None] - positions[None] < (window or 99)
    mask = np.asarray(LAYOUT.mask()) & near
    wide = (np.asarray(x, np.float64) for x in row)
    want = oracle(*wide, mask, 6**-0.5, softcap)
    real = np.asarray(LAYOUT.segments) >= 0
    assert got.dtype == dtype
    assert np.abs(np.asarray(got) - want)[real].max() < bound


def test_parts_of_the_queries_leave_out_keys_that_none_of_them_sees(monkeypatch):
    row = draw(LAYOUT.length, jnp.float64)

    def values():
        def total(*row):
            output = attend_by_layout(LAYOUT, *row, masks(LAYOUT, None), config=CONFIG, rng=None)
            return jnp.where((LAYOUT.segments >= 0)[:, None, None], jnp.sin(output), 0).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*row)

    want = values()
    monkeypatch.setattr(attended, "LEAST_QUERIES", 2)
    ends = [(own.stop, keys.stop) for own, keys in attended.visible_parts("keys", 4, 11)]
    assert ends == [(2, 9), (4, 11)]
    ends = [(own.stop, keys.stop) for own, keys in attended.visible_parts("causal", 7, 7)]
    assert ends == [(2, 2), (4, 4), (7, 7)]
    assert attended.visible_parts("any", 7, 9) == [(slice(0, 7), slice(0, 9))]
    for got, expected in zip(jax.tree.leaves(values()), jax.tree.leaves(want), strict=True):
        assert jnp.abs(got - expected).max() < 1e-13


@pytest.mark.slow
def test_a_packed_pair_that_crosses_blocks_is_seen_to_its_first_token():
    # The last token of the longest pair, of 8, is the first of a block of 9.
    layout = PackedLayout(jnp.array([[1, 1, 0], [3, 2, 3], [4, 2, 1]]), 36, 6, 8)
    assert -(-layout.length // attention.PACKED_BLOCKS) == 9
    row = draw(layout.length, jnp.float64)
    got = attend_by_layout(layout, *row, masks(layout, None), config=CONFIG, rng=None)
    want = oracle(*map(np.asarray, row), np.asarray(layout.mask()), 6**-0.5, None)
    real = np.asarray(layout.pairs) >= 0
    assert np.abs(np.asarray(got) - want)[real].max() < 1e-13


def plain(query, key, value, mask, softcap):
    """Grouped attention by a softmax that JAX differentiates."""
    shared = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, shared, axis=2) for x in (key, value))
    scores = jnp.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, value)


# With 30 the queries, of a prime number, go in blocks of 3 with 2 more as padding. With 150, two of
# the four key heads of the rows run at once.
@pytest.mark.parametrize(("length", "at_once"), [(6, 1), (6, 40), (7, 30), (6, 150), (6, 10**6)])
@pytest.mark.parametrize("softcap", [pytest.param(None, marks=pytest.mark.slow), 2.0])
def test_gradient_block_by_block(monkeypatch, length, at_once, softcap):
    monkeypatch.setitem(blockwise.SCORES_AT_ONCE, "cpu", at_once)
    config = dataclasses.replace(CONFIG, attention_softcap=softcap)
    operands = [jnp.stack([x, 2 * x]) for x in draw(length, jnp.float64)]
    mask = jnp.tri(length, dtype=bool).at[4, 1].set(False)
    slopes = jax.random.normal(jax.random.key(0), operands[0].shape)

    def objective(attention, *operands):
        return (slopes * attention(*operands)).sum()

    ours = partial(objective, lambda *x: attend(*x, mask, config=config))
    theirs = partial(objective, lambda *x: plain(*x, mask, softcap))
    both = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*operands) for f in (ours, theirs))
    got, want = map(jax.tree.leaves, both)
    assert max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)) < 1e-13
    if at_once == 40:
        jax.test_util.check_grads(jax.jit(ours), operands, order=2, modes=("rev",))


@pytest.mark.parametrize("at_once", [1, 40, 150, 10**6])
def test_pairs_with_their_own_masks_run_in_turns(monkeypatch, at_once):
    monkeypatch.setitem(blockwise.SCORES_AT_ONCE, "cpu", at_once)
    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.normal(size=(3, 2, *x.shape))) for x in draw(6, jnp.float64)]
    seen = jnp.asarray(rng.integers(0, 2, (3, 6, 6)) + np.eye(6) > 0)

    def total(attention, *rows):
        return jnp.sin(jax.vmap(attention)(*rows, seen)).sum()

    ours = partial(total, partial(attend, config=CONFIG))
    theirs = partial(total, partial(plain, softcap=None))
    both = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*rows) for f in (ours, theirs))
    got, want = map(jax.tree.leaves, both)
    assert max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)) < 1e-13


@pytest.mark.parametrize(
    ("platform", "devices", "at_once"), [("cpu", 1, 1), ("cpu", 2, 4), ("cuda", 1, 4)]
)
def test_on_one_cpu_the_products_of_long_rows_have_no_batch(platform, devices, at_once):
    """XLA would run a product with one in one thread. There are two pairs and two key heads."""
    config = dataclasses.replace(CONFIG, head_width=8)
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shapes = [
        jax.ShapeDtypeStruct((2, 1, 1024, n, 8), jnp.float32, sharding=rows) for n in (4, 2, 2)
    ]

    def total(*rows):
        return jax.vmap(lambda *row: attend(*row, None, config=config))(*rows).sum()

    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    batches = []
    for axes, shape in re.findall(
        r"dot_general.* batching_dims = \[(.*?)\].* \(tensor<(.*?)xf32", text
    ):
        sizes = [int(size) for size in shape.split("x")]
        batches.append(math.prod(sizes[int(axis)] for axis in axes.split(",")))
    assert set(batches) == {at_once}
    assert len(batches) == text.count("dot_general") > 8


@pytest.mark.parametrize("length", [4096, 4099], ids=["even", "prime"])
def test_memory_does_not_grow_with_all_scores(length):
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32) for heads in (4, 2, 2)]

    def total(*operands):
        return attend(*operands, None, config=CONFIG).sum()

    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*shapes).compile()
    scores = 4 * 4 * length**2
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 5


def test_dropout_of_the_weights():
    config = dataclasses.replace(CONFIG, attention_dropout=0.5)
    query, key, value = (x[None] for x in draw(40, jnp.float32))
    plain = attend(query, key, value, None, config=config)
    keys = jax.random.split(jax.random.key(0), 200)
    dropped = jax.vmap(lambda rng: attend(query, key, value, None, config=config, rng=rng))(keys)
    assert np.abs(dropped[0] - plain).max() > 0.1
    assert np.abs(dropped.mean(axis=0) - plain).max() < 0.5
    # The first token sees itself alone: all or nothing, twice as large.
    ratio = np.asarray(dropped[:, 0, 0, 0, 0] / plain[0, 0, 0, 0])
    assert set(np.round(ratio, 4)) == {0.0, 2.0}


def tables_of(settings, width, positions, tokens=None):
    return rotary.tables(settings, width, positions, tokens, jnp.dtype("float64"))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_depends_on_distance_alone(interleaved):
    tables = tables_of(models.Rotary(theta=100.0), 6, jnp.arange(20))
    query, key, _ = draw(1, jnp.float64)
    rotated = [
        rotary.rotate(jnp.broadcast_to(x, (20, *x.shape[1:])), tables, interleaved=interleaved)
        for x in (query, key)
    ]
    scores = np.einsum("ih,jh->ij", rotated[0][:, 0], rotated[1][:, 0])
    for distance in (0, 3, 11):
        along = np.diagonal(scores, distance)
        assert np.ptp(along) < 1e-12
    assert np.ptp(scores[0]) > 0.1
    assert np.allclose(rotated[0][0], query[0])


def test_partial_rotation_leaves_the_rest():
    tables = tables_of(models.Rotary(fraction=0.5), 12, jnp.arange(3))
    heads = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 12)))
    rotated = rotary.rotate(heads, tables, interleaved=False)
    assert np.array_equal(rotated[..., 6:], heads[..., 6:])
    assert np.abs(rotated - heads)[1:, :, :6].min() > 1e-6


def test_frequencies():
    """The kinds of scaling against their definitions, one frequency after the other."""
    plain = 500.0 ** (-np.arange(0, 16, 2) / 16)
    assert np.allclose(rotary.default(models.Rotary(theta=500.0), 16), plain)
    stretched = models.Rotary(theta=500.0, kind="linear", factor=4.0)
    assert np.allclose(rotary.linear(stretched, 16), plain / 4)

    llama3 = models.Rotary(theta=500.0, kind="llama3", factor=8.0, original_length=64)
    for got, frequency in zip(rotary.llama3(llama3, 16), plain, strict=True):
        wavelength = 2 * np.pi / frequency
        smooth = (64 / wavelength - 1) / (4 - 1)
        blend = (1 - smooth) * frequency / 8 + smooth * frequency
        want = frequency if wavelength < 16 else frequency / 8 if wavelength > 64 else blend
        assert np.isclose(got, want, rtol=1e-12)

    yarn = models.Rotary(theta=500.0, kind="yarn", factor=4.0, original_length=256)
    low, high = (16 * np.log(256 / (turns * 2 * np.pi)) / (2 * np.log(500.0)) for turns in (32, 1))
    low, high = np.floor(low), np.ceil(high)
    ramp = np.clip((np.arange(8) - max(low, 0)) / (min(high, 15) - max(low, 0)), 0, 1)
    assert np.allclose(rotary.yarn(yarn, 16), plain / 4 * ramp + plain * (1 - ramp))

    part = models.Rotary(theta=500.0, kind="proportional", factor=2.0, fraction=0.5)
    turning = np.where(np.arange(8) < 4, plain / 2, 0)
    assert np.allclose(rotary.proportional(part, 16), turning)


def test_frequencies_by_length():
    """Up to the limit as without scaling or with the short factors, and another set beyond it."""
    plain, wide = 500.0 ** (-np.arange(0, 16, 2) / 16), jnp.dtype("float64")
    grown = models.Rotary(theta=500.0, kind="dynamic", factor=3.0, original_length=10)
    for tokens in (1, 10, 25):
        growth = 3 * max(tokens, 10) / 10 - 2
        theta = 500.0 * growth ** (16 / 14)
        want = theta ** (-np.arange(0, 16, 2) / 16)
        assert np.allclose(rotary.dynamic(grown, 16, jnp.asarray(tokens), wide), want)
    factors = {"short_factors": (1.0,) * 7 + (2.0,), "long_factors": (4.0,) * 8}
    long = models.Rotary(theta=500.0, kind="longrope", original_length=10, **factors)
    for tokens, divisors in ((10, factors["short_factors"]), (11, factors["long_factors"])):
        got = rotary.longrope(long, 16, jnp.asarray(tokens), wide)
        assert np.allclose(got, plain / np.asarray(divisors))
    for settings in (grown, long):
        assert settings.limit == 10
        short, same, other = (
            tables_of(settings, 16, jnp.arange(4), tokens).cos
            for tokens in (None, jnp.asarray(9), jnp.asarray(11))
        )
        assert np.array_equal(short, same)
        assert not np.array_equal(short, other)


def test_queries_grow_and_angles_turn_back():
    settings = models.Rotary(query_growth=0.2, original_length=4, reverse=True)
    tables, plain = (
        tables_of(one, 8, jnp.arange(10)) for one in (settings, models.Rotary(original_length=4))
    )
    want = 1 + 0.2 * np.log(1 + np.arange(10) // 4)
    assert np.allclose(tables.query_scale, want)
    assert plain.query_scale is None
    assert np.array_equal(tables.sin, -plain.sin)
    assert np.array_equal(tables.cos, plain.cos)


def test_a_vmap_over_something_else():
    """Such as a sweep over `beta`: attention then has no axis of it, but JAX asks its rule."""
    x, mask = draw(5, jnp.float64)[0][None], jnp.tri(5, dtype=bool)
    config = models.Config(vocab=1, width=1, layers=1, heads=x.shape[2], head_width=x.shape[3])
    want = attend(x, x, x, mask, config=config).sum()
    found = jax.vmap(lambda scale: scale * attend(x, x, x, mask, config=config).sum())(
        jnp.arange(2.0)
    )
    np.testing.assert_allclose(found, want * np.arange(2.0), rtol=1e-12)
