"""Pairs and labels from samples and rewards, against a brute-force loop over Python numbers."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models

PROMPTS, SAMPLES, LENGTH = 3, 4, 5
REWARDS = np.array([[0.5, 2.0, -1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [3.0, 3.0, 2.5, 2.5]])


@pytest.fixture
def prompt():
    mask = np.arange(6) < np.array([[6], [2], [4]])
    return dpx.Tokens(np.arange(18).reshape(3, 6), mask)


@pytest.fixture
def samples():
    # Every id names its sample, so that a mixed-up row shows.
    ids = 100 * np.arange(PROMPTS)[:, None, None] + 10 * np.arange(SAMPLES)[:, None]
    lengths = np.random.default_rng(0).integers(1, LENGTH + 1, (PROMPTS, SAMPLES, 1))
    tokens = dpx.Tokens(ids + np.arange(LENGTH), np.arange(LENGTH) < lengths)
    return models.Samples(tokens, np.zeros((PROMPTS, SAMPLES)))


def names(tokens):
    """The number of the prompt and of the sample of each row."""
    return [(int(row[0]) // 100, int(row[0]) % 100 // 10) for row in np.asarray(tokens.ids)]


def check_rows(batch, prompt, samples, per_prompt):
    """Every row holds its own prompt, and the ids and mask of the samples that it names."""
    assert np.array_equal(batch.prompt.ids, np.repeat(prompt.ids, per_prompt, axis=0))
    assert np.array_equal(batch.prompt.mask, np.repeat(prompt.mask, per_prompt, axis=0))
    for side in (batch.chosen, batch.rejected):
        for row, (i, j) in enumerate(names(side)):
            assert i == row // per_prompt
            assert np.array_equal(side.ids[row], samples.tokens.ids[i, j])
            assert np.array_equal(side.mask[row], samples.tokens.mask[i, j])


def test_the_best_and_the_worst_sample_make_a_pair(prompt, samples):
    batch = dpx.pair_samples(prompt, samples, REWARDS, offset=True)
    check_rows(batch, prompt, samples, 1)
    assert names(batch.chosen)[0] == (0, 1)
    assert names(batch.rejected)[0] == (0, 2)
    assert batch.weight.tolist() == [1, 0, 1]
    assert batch.per_pair["offset"].tolist() == [3, 0, 0.5]


def test_all_pairs_are_all_pairs_the_right_way_round(prompt, samples):
    batch = dpx.pair_samples(prompt, samples, REWARDS, how="all", min_gap=0.5, offset=True)
    check_rows(batch, prompt, samples, 6)
    expected = [
        (i, frozenset(pair), abs(REWARDS[i, pair[0]] - REWARDS[i, pair[1]]))
        for i in range(PROMPTS)
        for pair in itertools.combinations(range(SAMPLES), 2)
    ]
    for row, (i, pair, gap) in enumerate(expected):
        (_, j), (_, k) = names(batch.chosen)[row], names(batch.rejected)[row]
        assert {j, k} == pair
        assert REWARDS[i, j] >= REWARDS[i, k]
        # A gap of exactly `min_gap` is kept; a tie never is.
        assert float(batch.weight[row]) == (gap >= 0.5)
        assert float(batch.per_pair["offset"][row]) == (gap if gap >= 0.5 else 0)


def test_random_pairs_are_two_samples_drawn_evenly(prompt, samples):
    def pair(key):
        return dpx.pair_samples(prompt, samples, REWARDS, how="random", key=key)

    drawn = jax.jit(jax.vmap(pair))(jax.random.split(jax.random.key(0), 600))
    first, second = (np.asarray(x.ids[:, 0, 0]) // 10 for x in (drawn.chosen, drawn.rejected))
    assert (REWARDS[0, first] > REWARDS[0, second]).all()
    counts = np.bincount(4 * first + second, minlength=16)
    assert sorted(counts)[:10] == [0] * 10
    # Six pairs of probability 1/6: five standard deviations of 9.1.
    assert abs(np.asarray(sorted(counts)[10:]) - 100).max() < 46


def test_random_pairs_of_a_prompt_depend_on_its_own_key(prompt, samples):
    keys = jax.random.split(jax.random.key(1), PROMPTS)
    whole = dpx.pair_samples(prompt, samples, REWARDS, how="random", key=keys)
    tail = jax.tree.map(lambda x: x[1:], (prompt, samples, REWARDS))
    rest = dpx.pair_samples(*tail, how="random", key=keys[1:])
    assert names(whole.chosen)[1:] == names(rest.chosen)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_weighs_nothing_under_jit(prompt, samples, bad):
    rewards = jnp.asarray(REWARDS).at[0, 3].set(bad)

    @jax.jit
    def weights(rewards):
        pairs = [
            dpx.pair_samples(prompt, samples, rewards, how=how, offset=True)
            for how in ("best_worst", "all")
        ]
        labelled = dpx.label_samples(prompt, samples, rewards)
        assert pairs[0].per_pair is not None
        assert pairs[1].per_pair is not None
        return pairs[0].weight, pairs[1].weight, labelled.weight, pairs[1].per_pair["offset"]

    best, everything, labelled, gaps = weights(rewards)
    assert best.tolist() == [0, 0, 1]
    assert everything[:6].tolist() == [1, 1, 0, 1, 0, 0]
    assert labelled[:4].tolist() == [0, 0, 0, 0]
    assert labelled[8:].tolist() == [1] * 4
    assert np.isfinite(gaps).all()


def test_labels_compare_with_the_prompts_mean_or_a_threshold(prompt, samples):
    batch = dpx.label_samples(prompt, samples, REWARDS, kl=True)
    assert batch.label.tolist()[:4] == [True, True, False, False]
    assert batch.weight.tolist() == [1] * 4 + [0] * 4 + [1] * 4
    assert names(batch.completion) == list(itertools.product(range(PROMPTS), range(SAMPLES)))
    others = [((i + 1) % PROMPTS, j) for i, j in itertools.product(range(PROMPTS), range(SAMPLES))]
    assert names(batch.kl) == others
    batch = dpx.label_samples(prompt, samples, REWARDS, threshold=1.0)
    assert batch.label.tolist() == (REWARDS >= 1).reshape(-1).tolist()
    assert batch.weight.tolist() == [1] * 12
    assert batch.kl is None


def test_a_pair_of_weight_0_moves_nothing(prompt, samples):
    log_probs = dpx.PairLogProbs(
        jnp.array([-1.0, -2.0, -3.0]), jnp.array([-2.0, -1.0, -4.0]), weight=None
    )
    batch = dpx.pair_samples(prompt, samples, REWARDS, offset=True)
    loss = losses.odpo(log_probs, log_probs, offset=batch.per_pair["offset"]).loss
    assert np.isfinite(loss).all()


BAD = {
    "shape of samples": ({"samples": 2}, "`samples` must have shape .* prompts of `prompt`, 3"),
    "one sample": ({"samples": 1, "rewards": REWARDS[:, :1]}, "at least 2 completions"),
    "shape of rewards": ({"rewards": REWARDS[:, :3]}, r"shape \(3, 4\); got \(3, 3\)"),
    "list of rewards": ({"rewards": REWARDS.tolist()}, "`rewards` must be an array"),
    "not finite": (
        {"rewards": np.where(REWARDS == 2.5, np.nan, REWARDS)},
        "got nan for sample 2 of prompt 2",
    ),
    "how": ({"how": "best"}, "`how` must be one of 'best_worst', 'all', 'random'; got 'best'"),
    "min_gap": ({"min_gap": -1.0}, "`min_gap` must not be negative"),
    "not a number": ({"min_gap": float("nan")}, "`min_gap` must not be negative"),
    "no key": ({"how": "random"}, "`key` is required"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_errors_name_the_argument(prompt, samples, change, message):
    change = dict(change)
    tokens = samples.tokens
    few = {
        2: jax.tree.map(lambda x: x[:2], tokens),
        1: jax.tree.map(lambda x: x[:, :1], tokens),
        None: tokens,
    }[change.pop("samples", None)]
    rewards = change.pop("rewards", REWARDS)
    # Without the type checks of the tests, as a user meets it.
    pair_samples = dpx.pair_samples.__wrapped__ if isinstance(rewards, list) else dpx.pair_samples
    if change.get("how") == "best":
        pair_samples = dpx.pair_samples.__wrapped__
    with pytest.raises(ValueError, match=message):
        pair_samples(prompt, few, rewards, **change)


def test_labels_with_kl_need_two_prompts(prompt, samples):
    one = jax.tree.map(lambda x: x[:1], (prompt, samples, REWARDS))
    with pytest.raises(ValueError, match=re.escape("at least two prompts; got 1")):
        dpx.label_samples(*one, kl=True)
