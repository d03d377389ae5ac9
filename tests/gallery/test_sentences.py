"""The language of the gallery: its exact quantities against sampling and against brute force."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from shared import sentences

import dpo_eqx as dpx
from dpo_eqx import models

SMALL = sentences.Language(words=2, length=3)
KEY = jax.random.key(0)
TABLE = sentences.Table(jax.random.normal(KEY, (SMALL.prefixes, SMALL.vocab)))
NETWORK = sentences.Network(SMALL, 5, key=KEY)
GRAMMAR = sentences.bigrams(SMALL, KEY)
REWARD = sentences.random_reward(SMALL, jax.random.key(1))
log_probs_of = eqx.filter_jit(SMALL.log_probs)


def test_the_sentences_are_all_that_a_policy_can_write():
    ids, mask = SMALL.tokens.ids, SMALL.tokens.mask
    written = ["".join("ab."[i] for i in row[seen]) for row, seen in zip(ids, mask, strict=True)]
    short = [".", "a.", "b.", "aa.", "ab.", "ba.", "bb."]
    assert written == [*short, "aaa", "aab", "aba", "abb", "baa", "bab", "bba", "bbb"]
    assert SMALL.prefixes == 7


@pytest.mark.parametrize("policy", [TABLE, NETWORK, GRAMMAR], ids=["table", "network", "grammar"])
def test_probabilities_add_up_to_one(policy):
    np.testing.assert_allclose(jnp.exp(log_probs_of(policy)).sum(), 1, rtol=1e-12)


def test_a_table_has_its_own_logits_for_each_prefix():
    steps = np.asarray(jax.nn.log_softmax(TABLE.logits))
    got = np.asarray(log_probs_of(TABLE))
    # Prefixes in the order of their lengths: "", a, b, aa, ab, ba, bb.
    np.testing.assert_allclose(got[0], steps[0, 2], rtol=1e-12)
    np.testing.assert_allclose(got[5], steps[0, 1] + steps[2, 0] + steps[5, 2], rtol=1e-12)
    np.testing.assert_allclose(got[14], steps[0, 1] + steps[2, 1] + steps[6, 1], rtol=1e-12)


def test_a_grammar_looks_at_the_last_word_only():
    logits = np.asarray(GRAMMAR.logits)  # prefixes "", a, b, aa, ab, ba, bb
    np.testing.assert_array_equal(logits[[1, 3, 5]], logits[[1, 1, 1]])
    np.testing.assert_array_equal(logits[[2, 4, 6]], logits[[2, 2, 2]])
    assert len(np.unique(logits[:, 0])) == 3


def test_a_network_is_causal():
    one, other = jnp.array([2, 0, 1, 1]), jnp.array([2, 0, 0, 2])
    before, after = NETWORK(one), NETWORK(other)
    np.testing.assert_array_equal(before[:2], after[:2])
    assert abs(before[2] - after[2]).max() > 1e-3


def test_the_probabilities_are_those_of_samples():
    draws = 4000
    drawn = models.sample(
        NETWORK, SMALL.prompt(1), samples=draws, max_new_tokens=3, key=KEY, eos=SMALL.end
    )
    ids = np.where(drawn.tokens.mask[0], drawn.tokens.ids[0], SMALL.end)
    counts = (ids[:, None] == SMALL.tokens.ids).all(-1).sum(0)
    assert counts.sum() == draws
    expected = np.exp(log_probs_of(NETWORK))
    error = np.sqrt(expected * (1 - expected) / draws)
    assert (abs(counts / draws - expected) < 3 * error).all()


@pytest.mark.usefixtures("standard_promotion")
def test_fitting_reaches_the_target():
    start = sentences.Table(jnp.zeros((SMALL.prefixes, SMALL.vocab)))
    target = log_probs_of(GRAMMAR)
    fitted = jax.jit(lambda t: sentences.fit(start, SMALL, t, steps=300, rate=0.2))(target)
    assert sentences.kl(target, log_probs_of(start)) > 0.1
    assert sentences.kl(target, log_probs_of(fitted)) < 1e-5


def test_labels_are_bradley_terrys():
    log_probs, pairs = log_probs_of(TABLE), 20_000
    chosen, rejected = sentences.draw_pairs(KEY, log_probs, REWARD, pairs)
    p = np.exp(log_probs)
    expected = 2 * p[:, None] * p * np.asarray(sentences.preferences(REWARD))
    counts = np.zeros_like(expected)
    np.add.at(counts, (np.asarray(chosen), np.asarray(rejected)), 1)
    error = np.sqrt(expected * (1 - expected) / pairs)
    # 225 cells: four standard errors leave a chance of 1.4% for one of them, so 1 may be out.
    assert (abs(counts / pairs - expected) > 4 * error).sum() <= 1
    assert (abs(counts / pairs - expected.T) > 4 * error).sum() > 20


def test_a_batch_holds_the_sentences_by_number():
    batch = SMALL.pairs(np.array([5, 0]), np.array([14, 3]), weight=np.array([1.0, 2.0]))
    scores = eqx.filter_jit(dpx.score_pairs)(TABLE, batch)
    log_probs = log_probs_of(TABLE)
    np.testing.assert_allclose(scores.chosen, log_probs[np.array([5, 0])], rtol=1e-12)
    np.testing.assert_allclose(scores.rejected, log_probs[np.array([14, 3])], rtol=1e-12)
    np.testing.assert_array_equal(scores.chosen_length, [3, 1])


def test_the_optimum_maximises_reward_minus_kl():
    log_reference, beta = log_probs_of(GRAMMAR), 0.3

    def minus_objective(logits):
        p = jax.nn.log_softmax(logits)
        return beta * sentences.kl(p, log_reference) - sentences.expectation(p, REWARD)

    found = optimize.minimize(
        jax.jit(jax.value_and_grad(minus_objective)), np.zeros(15), jac=True, tol=1e-12
    )
    optimum = np.asarray(sentences.optimum(log_reference, REWARD, beta))
    np.testing.assert_allclose(jax.nn.softmax(found.x), np.exp(optimum), atol=1e-5)


def test_the_frontier_is_the_optimums():
    log_reference = log_probs_of(GRAMMAR)
    best = [sentences.optimum(log_reference, REWARD, beta) for beta in (0.1, 0.5, 2.0)]
    at = jnp.stack([sentences.kl(p, log_reference) for p in best])
    expected = [sentences.expectation(p, REWARD) for p in best]
    got = eqx.filter_jit(sentences.best_reward)(log_reference, REWARD, jnp.append(at, 50.0))
    np.testing.assert_allclose(got, [*expected, REWARD.max()], rtol=1e-9)


def test_the_reward_is_standardised_and_depends_on_neighbours():
    np.testing.assert_allclose([REWARD.mean(), REWARD.std()], [0, 1], atol=1e-12)
    same_words = [SMALL.tokens.ids.tolist().index(x) for x in ([0, 0, 1], [0, 1, 0])]
    assert REWARD[same_words[0]] != REWARD[same_words[1]]
