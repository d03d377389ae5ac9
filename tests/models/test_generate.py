"""Sampling: the cache against the uncached forward pass, the distributions, the ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import models
from dpo_eqx.models._decoder.sample import choose, keep_top_k, keep_top_p

from .golden import FOLDER, Uncached


@pytest.fixture(scope="module")
def prompt():
    lengths = np.array([15, 4, 9])
    ids = np.random.default_rng(0).integers(0, 96, (3, 15))
    return dpx.Tokens(ids, np.arange(15) < lengths[:, None])


@pytest.fixture(scope="module")
def policy():
    return models.load(FOLDER / "families" / "gemma2")


@pytest.fixture(scope="module")
def greedy(policy, prompt):
    return models.generate(policy, prompt, max_new_tokens=14, temperature=0)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "phi", "mistral-sliding")]


def test_cache_equals_uncached(policy, prompt, greedy):
    # Past the window of 12, and in a family in which only every other layer has one.
    want = models.generate(Uncached(policy), prompt, max_new_tokens=14, temperature=0)
    assert np.array_equal(greedy.ids, want.ids)
    assert np.all(greedy.mask)


@pytest.mark.parametrize("name", ["gpt2", *SLOW])
def test_cache_equals_uncached_in_other_families(name, prompt):
    policy = models.load(FOLDER / "families" / name)
    got, want = (
        models.generate(policy, prompt, max_new_tokens=14, temperature=0)
        for policy in (policy, Uncached(policy))
    )
    assert np.array_equal(got.ids, want.ids)


def test_padding_has_no_influence(policy, prompt, greedy):
    other = dpx.Tokens(np.where(prompt.mask, prompt.ids, 95), prompt.mask)
    got = models.generate(policy, other, max_new_tokens=14, temperature=0)
    assert np.array_equal(got.ids, greedy.ids)


def test_mask_ends_with_the_end_token(policy, prompt, greedy):
    ends = [int(greedy.ids[0, 3]), int(greedy.ids[1, 0])]
    got = models.generate(policy, prompt, max_new_tokens=14, temperature=0, eos=ends)
    for row in range(3):
        is_end = np.isin(greedy.ids[row], ends)
        count = np.argmax(is_end) + 1 if is_end.any() else 14
        assert np.array_equal(got.mask[row], np.arange(14) < count)
        assert np.array_equal(got.ids[row, :count], greedy.ids[row, :count])


def test_draws_depend_on_the_key_and_the_row_alone(policy, prompt):
    def draw(seed):
        return models.generate(policy, prompt, max_new_tokens=4, key=jax.random.key(seed)).ids

    first = draw(0)
    assert np.array_equal(first, draw(0))
    assert not np.array_equal(first, draw(1))


def test_distribution_of_draws():
    logits = jnp.asarray([1.0, 0.0, -0.5, 2.0, -jnp.inf], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)

    def frequencies(**settings):
        draws = jax.vmap(lambda key: choose(logits, key, **settings))(keys)
        return np.bincount(draws, minlength=5) / len(keys)

    def close(got, want):
        # Four standard deviations of a frequency near a half.
        assert np.abs(got - np.asarray(want) / np.sum(want)).max() < 4 * 0.5 / np.sqrt(len(keys))

    weights = np.exp(np.asarray(logits) / 0.7)
    close(frequencies(temperature=0.7, top_k=None, top_p=None), weights)
    close(frequencies(temperature=0.7, top_k=2, top_p=None), weights * [1, 0, 0, 1, 0])
    # The largest has 0.76 of the whole at this temperature, so 0.8 needs the second too.
    close(frequencies(temperature=0.7, top_k=None, top_p=0.8), weights * [1, 0, 0, 1, 0])
    close(frequencies(temperature=0.7, top_k=None, top_p=0.7), weights * [0, 0, 0, 1, 0])


def test_filters():
    logits = jnp.asarray([0.0, 3.0, 1.0, 2.0], jnp.float32)
    assert np.array_equal(keep_top_k(logits, 2), [-np.inf, 3, -np.inf, 2])
    assert np.array_equal(keep_top_k(logits, 9), logits)
    assert np.array_equal(keep_top_p(logits, 1e-6), [-np.inf, 3, -np.inf, -np.inf])
    assert np.array_equal(keep_top_p(logits, 1.0), logits)


def test_temperature_is_traced(policy, prompt):
    key = jax.random.key(0)
    draws = [
        models.generate(
            policy, prompt, max_new_tokens=4, temperature=jnp.asarray(t, jnp.float32), key=key
        )
        for t in (1e-4, 1.0)
    ]
    want = models.generate(policy, prompt, max_new_tokens=4, temperature=0)
    assert np.array_equal(draws[0].ids, want.ids)
    assert not np.array_equal(draws[1].ids, want.ids)


def test_errors(policy, prompt):
    def run(**settings):
        return models.generate(policy, prompt, **{"max_new_tokens": 4, **settings})

    with pytest.raises(ValueError, match="`key` is required to sample tokens"):
        run()
    with pytest.raises(ValueError, match="`temperature` must not be negative; got -1"):
        run(temperature=-1)
    with pytest.raises(ValueError, match="`max_new_tokens` must be positive; got 0"):
        run(max_new_tokens=0)
    with pytest.raises(ValueError, match="`top_k` must be positive; got 0"):
        run(top_k=0, temperature=0)
    with pytest.raises(ValueError, match=r"`top_p` must be in \(0, 1\]; got 1.5"):
        run(top_p=1.5, temperature=0)
    with pytest.raises(ValueError, match=r"`prompt` must have shape `\(prompts, length\)`"):
        models.generate(policy, dpx.Tokens(prompt.ids[0], prompt.mask[0]), max_new_tokens=1)


def test_padding_of_prompts_needs_no_learned_position():
    policy = models.load(FOLDER / "families" / "gpt2")
    ids = np.arange(250)[None] % 90
    prompts = [
        dpx.Tokens(np.pad(ids, [(0, 0), (0, more)]), np.arange(250 + more)[None] < 250)
        for more in (0, 30)
    ]
    one, other = (
        models.generate(policy, prompt, max_new_tokens=6, temperature=0) for prompt in prompts
    )
    np.testing.assert_array_equal(one.ids, other.ids)


def test_learned_positions_run_out(prompt):
    policy = models.load(FOLDER / "families" / "gpt2")
    with pytest.raises(ValueError, match="at most 256 tokens; got a row of up to 265"):
        models.generate(policy, prompt, max_new_tokens=250, temperature=0)
