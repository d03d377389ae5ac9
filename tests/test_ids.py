"""Token ids of every integer dtype give what int32 gives, to the last bit."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, models

from .policies import VOCAB, Attention, Perceptron, Plain, random_batch

DTYPES = ["int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64"]
DECODER = models.Transformer(
    models.Config(vocab=VOCAB, width=8, layers=1, heads=2), key=jax.random.key(0)
)
POLICIES = {
    "plain": Perceptron(jax.random.key(0)),
    "fast": Attention(jax.random.key(0), length=400),
    "decoder": DECODER,
    "decoder alone": Plain(DECODER),
}
# The second has rows of more tokens than int8, and than uint8, can count.
BATCHES = {
    "short": random_batch(pairs=2, prompt=3, completion=4),
    "long": random_batch(pairs=2, prompt=300, completion=3),
}

score = eqx.filter_jit(dpx.score_pairs)
logits = eqx.filter_jit(DECODER)
hidden = eqx.filter_jit(DECODER.hidden)


def in_dtype(batch, dtype):
    """The ids in `dtype`, under the padding whatever -7 becomes in it."""

    def cast(tokens):
        return dpx.Tokens(tokens.ids.astype(dtype), tokens.mask)

    parts = {name: cast(getattr(batch, name)) for name in ("prompt", "chosen", "rejected")}
    return dataclasses.replace(batch, **parts)


def assert_same(got, want):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def check_scores(name, width, dtypes):
    want = score(POLICIES[name], in_dtype(BATCHES[width], np.int32))
    assert np.isfinite(want.chosen).all()
    for dtype in dtypes:
        assert_same(score(POLICIES[name], in_dtype(BATCHES[width], dtype)), want)


@pytest.mark.parametrize("name", ["plain", "fast", "decoder"])
def test_scores_are_those_of_int32(name):
    check_scores(name, "long", ["int8", "uint8"])


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("width", BATCHES)
def test_scores_are_those_of_int32_in_every_dtype(name, width):
    check_scores(name, width, DTYPES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_policy_sees_int32(dtype):
    seen = []

    def spy(ids):
        seen.append(ids.dtype)
        return jnp.zeros((ids.size, VOCAB))

    class Spy(eqx.Module):
        unembedding: jax.Array

        def hidden(self, ids, layout, *, key=None):
            seen.extend([ids.dtype, layout.prompt_length.dtype, layout.positions.dtype])
            return jnp.zeros((ids.size, 2))

    batch = in_dtype(BATCHES["short"], dtype)
    on_device = jax.tree.map(jnp.asarray, batch)
    unpaired = dpx.UnpairedBatch(batch.prompt, batch.chosen, np.ones(2, bool), kl=batch.rejected)
    fast = Spy(jnp.zeros((VOCAB, 2)))
    for policy in (spy, fast):
        for given in (batch, on_device):
            eqx.filter_eval_shape(dpx.score_pairs, policy, given)
        eqx.filter_eval_shape(dpx.score_unpaired, policy, unpaired)
        eqx.filter_eval_shape(dpx.ld_score(0.5), policy, batch)
        eqx.filter_eval_shape(dpx.compare, policy, policy, batch)
    assert set(seen) == {jnp.dtype(jnp.int32)}


def test_parts_of_several_dtypes():
    dtypes = {"prompt": np.uint8, "chosen": np.int64, "rejected": np.uint16}
    batch = BATCHES["short"]
    mixed = dataclasses.replace(
        batch, **{name: getattr(in_dtype(batch, d), name) for name, d in dtypes.items()}
    )
    policy = POLICIES["fast"]
    assert_same(score(policy, mixed), score(policy, in_dtype(batch, "int32")))


def test_packed_rows():
    """Three pairs in a row of 330 tokens, which no byte can count."""
    rng = np.random.default_rng(0)

    def tokens(width):
        return rng.integers(0, VOCAB, width).tolist()

    rows = [
        {"prompt_ids": tokens(n), "chosen_ids": tokens(4), "rejected_ids": tokens(3)}
        for n in (150, 120, 39)
    ]
    packed = data.pack(rows, 330, dtype=np.float64)
    narrow = dataclasses.replace(packed, ids=packed.ids.astype(np.uint8))
    wide = jax.tree.map(lambda x: x.astype(np.int64) if x.dtype == np.int32 else x, packed)
    run = eqx.filter_jit(dpx.score_packed)
    want = run(DECODER, packed)
    assert np.isfinite(want.chosen).all()
    assert_same(run(DECODER, narrow), want)
    assert_same(run(DECODER, wide), want)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_the_decoder_called_directly(dtype):
    ids = np.arange(7) % VOCAB
    layout = dpx.Layout(jnp.asarray(4, dtype), 4, (3,))
    assert layout.positions.dtype == jnp.int32
    given, wide = jnp.asarray(ids, dtype), jnp.asarray(ids, jnp.int32)
    assert_same(logits(given), logits(wide))
    assert_same(hidden(given, layout), hidden(wide, dpx.Layout(jnp.asarray(4), 4, (3,))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_count_in_int32(dtype):
    layout = dpx.Layout(jnp.asarray(100, dtype), 120, (60, 60))
    want = [*range(120), *range(100, 160), *range(100, 160)]
    np.testing.assert_array_equal(layout.positions, want)
    packed = dpx.PackedLayout(np.array([[100, 50, 60], [90, 20, 10]], dtype), 340, 160, 210)
    assert packed.positions.dtype == packed.lengths.dtype == jnp.int32
    starts_and_counts = [(0, 100), (100, 50), (100, 60), (0, 90), (90, 20), (90, 10)]
    want = np.concatenate([start + np.arange(count) for start, count in starts_and_counts])
    np.testing.assert_array_equal(packed.positions, np.pad(want, (0, 10)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_of_a_vocabulary_that_the_dtype_cannot_count(dtype):
    """A vocabulary of 256 is 0 in uint8, and 300 is no number of it at all."""
    rng = np.random.default_rng(0)
    hidden, unembedding = rng.normal(size=(5, 3)), rng.normal(size=(300, 3))
    targets = np.array([0, 1, 100, 126, 127])
    for vocab in (256, 300):
        logits = hidden @ unembedding[:vocab].T
        want = dpx.token_log_probs(logits, targets.astype(np.int32))
        assert np.isfinite(want).all()
        for cast in (np.asarray, jnp.asarray):
            got = dpx.token_log_probs(logits, cast(targets.astype(dtype)))
            np.testing.assert_array_equal(got, want)
    if dtype == "uint8":
        got = dpx.linear_token_log_probs(hidden, unembedding, targets.astype(dtype))
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "wrong"),
    [
        ("int64", 2**32 + 5),
        ("int64", 2**31),
        ("int64", -(2**32) + 5),
        ("uint64", 2**32 + 5),
        ("uint64", 2**64 - 1),
        ("uint32", 2**32 - 1),
        ("int8", -1),
    ],
)
@pytest.mark.parametrize("x64", [False, True])
def test_an_id_that_int32_cannot_hold_is_no_token(dtype, wrong, x64):
    ids = np.array([[1, wrong], [1, 2]], dtype)
    with jax.enable_x64(x64):
        prompt = dpx.Tokens(np.ones((2, 1), np.int32), np.ones((2, 1), bool))
        tokens = dpx.Tokens(ids, np.ones((2, 2), bool))
        batch = dpx.PreferenceBatch(prompt, tokens, tokens)
        policy = Perceptron(jax.random.key(0))
        np.testing.assert_array_equal(np.isnan(score(policy, batch).chosen), [True, False])
        direct = dpx.token_log_probs(np.zeros((2, 2, VOCAB)), ids)
        np.testing.assert_array_equal(np.isnan(direct), [[False, True], [False, False]])


def test_wide_ids_in_rows_of_data_do_not_wrap(unchecked):
    """Those in an array become no token; those in a list are refused by NumPy."""
    wide = [2, 2**32 + 5]
    rows = [{"prompt_ids": [1], "chosen_ids": np.array(wide), "rejected_ids": [3]}]
    with data.batches(rows, batch_size=1) as batches:
        batch = next(batches)
    assert batch.chosen.ids.max() == 2**31 - 1
    with pytest.raises(OverflowError):
        data.pack([rows[0] | {"chosen_ids": wide}], 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_sequences(dtype):
    ids, mask = np.array([[5, 6, 7, 8]]), np.array([[0, 0, 1, 1]], bool)
    batch = dpx.PreferenceBatch.from_sequences(
        ids.astype(dtype), mask, np.array([[5, 6, 9, 8]], np.int32), mask
    )
    np.testing.assert_array_equal(batch.prompt.ids, [[5, 6]])
    np.testing.assert_array_equal(batch.chosen.ids, [[7, 8]])
    np.testing.assert_array_equal(batch.rejected.ids, [[9, 8]])
