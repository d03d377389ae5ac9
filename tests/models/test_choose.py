"""The choice of a token from logits, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx.models._decoder.sample import choose, id_at, keep_top_k, keep_top_p, likeliest

DTYPES = [np.float32, np.float64]


def logits_of(vocab, dtype, seed=0):
    """Logits of both signs; every seventh is -inf, and so are the first and the last."""
    logits = np.random.default_rng(seed).normal(0, 3, vocab).astype(dtype)
    logits[::7], logits[-1] = -np.inf, -np.inf
    return logits


def softmax(logits):
    shares = np.exp(logits.astype(np.float64) - logits.max())
    return shares / shares.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 5, 64, 1000])
def test_places_are_those_of_the_distribution_function(vocab, dtype):
    logits = logits_of(vocab, dtype)
    logits[1] = 0.5
    up_to = np.cumsum(softmax(logits))
    places = np.random.default_rng(1).uniform(size=3000).astype(dtype)
    # Not at a step of the function, where rounding decides.
    places = places[abs(places[:, None] - up_to).min(axis=1) > 1e-5]
    assert len(places) > 2500
    ids = jax.vmap(lambda place: id_at(jnp.asarray(logits), place))(places)
    assert np.array_equal(ids, np.searchsorted(up_to, places, side="right"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_place_has_an_impossible_id(dtype):
    """At both ends and at all steps, a few bits to either side."""
    logits = logits_of(500, dtype)
    steps = np.cumsum(softmax(logits)).astype(dtype)
    near = [steps + i * np.finfo(dtype).eps * steps for i in range(-8, 9)]
    last = 1 - np.finfo(dtype).eps / 2
    places = np.clip(np.concatenate([*near, [0, last]]), 0, last).astype(dtype)
    ids = np.asarray(jax.vmap(lambda place: id_at(jnp.asarray(logits), place))(places))
    assert np.isfinite(logits[ids]).all()
    possible = np.flatnonzero(np.isfinite(logits))
    assert (ids[-2], ids[-1]) == (possible[0], possible[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_p", [1e-3, 0.3, 0.8, 0.99, 1.0])
def test_top_p_keeps_the_fewest_tokens(top_p, dtype):
    for seed in range(20):
        logits = logits_of(300, dtype, seed)
        shares, order = softmax(logits), np.argsort(-logits)
        before = np.empty(300)
        before[order] = np.cumsum(shares[order]) - shares[order]
        # Not where rounding decides.
        clear = abs(before - top_p) > 1e-5
        kept = np.asarray(keep_top_p(jnp.asarray(logits), top_p))
        want = np.where(before < top_p, logits, -np.inf)
        assert clear.sum() > 150
        assert np.array_equal(kept[clear], want[clear])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 17, 299, 300, 400])
def test_top_k_keeps_the_largest(top_k, dtype):
    logits = np.random.default_rng(0).normal(0, 3, 300).astype(dtype)
    least = np.sort(logits)[::-1][min(top_k, 300) - 1]
    kept = keep_top_k(jnp.asarray(logits), top_k)
    assert np.array_equal(kept, np.where(logits >= least, logits, -np.inf))


def test_top_k_keeps_ties():
    kept = np.isfinite(keep_top_k(jnp.asarray([1.0, 2.0, 1.0, 2.0, -1.0, 1.0]), 3))
    assert kept.tolist() == [True, True, True, True, False, True]


def test_top_p_keeps_ties():
    kept = np.isfinite(keep_top_p(jnp.asarray([1.0, 2.0, 1.0, 2.0, -1.0, 1.0]), 0.75))
    # The two likeliest have 0.55 of the probability; one of the three next would suffice.
    assert kept.tolist() == [True, True, True, True, False, True]
    # Zeros of both signs are equal.
    assert np.isfinite(keep_top_p(jnp.asarray([-0.0, 0.0, -9.0]), 0.4)).tolist() == [
        True,
        True,
        False,
    ]


def test_the_likeliest_is_the_first_of_the_largest():
    logits = np.random.default_rng(0).integers(-9, 9, (200, 30)).astype(np.float32)
    assert np.array_equal(jax.vmap(likeliest)(logits), logits.argmax(axis=1))
    # Whatever a broken policy returns, the id is one of the vocabulary.
    assert 0 <= likeliest(jnp.asarray([1.0, np.nan, 0.0])) < 3


def test_half_precision_draws_in_float32():
    """Of 4000 equal logits, bfloat16 could not sum the probabilities."""
    logits, keys = jnp.zeros(4000, jnp.bfloat16), jax.random.split(jax.random.key(0), 2000)
    options = {"temperature": 1.0, "top_k": None, "top_p": None}
    ids = np.asarray(jax.vmap(lambda key: choose(logits, key, **options))(keys))
    # Each quarter has 500, with a standard deviation of 19.
    assert abs(np.bincount(ids // 1000, minlength=4) - 500).max() < 90
