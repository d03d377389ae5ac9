"""Scores against a brute-force loop, and the fast path against the plain one."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx

from . import brute_force
from .policies import (
    VOCAB,
    Attention,
    Perceptron,
    Plain,
    Recurrent,
    assert_close,
    prefix_masks,
    random_batch,
    random_tokens,
)

score = eqx.filter_jit(dpx.score_pairs)


def gappy(batch, seed=1):
    """Scored in any pattern: unscored tokens between scored ones, one completion quite empty."""
    rng = np.random.default_rng(seed)

    def thinned(tokens, empty_row):
        mask = tokens.mask & (rng.random(tokens.mask.shape) < 0.6)
        mask[empty_row] = False
        return dpx.Tokens(np.where(tokens.mask, tokens.ids, -7), mask)

    return dataclasses.replace(
        batch, chosen=thinned(batch.chosen, 0), rejected=thinned(batch.rejected, 1)
    )


@pytest.mark.parametrize("batch", [random_batch(), gappy(random_batch(1))], ids=["full", "gappy"])
def test_against_brute_force(batch):
    policy = Recurrent(jax.random.key(0))
    got = score(policy, batch)
    want = np.array(brute_force.scores(policy, batch))
    np.testing.assert_allclose(got.chosen, want[:, 0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got.rejected, want[:, 1], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(got.chosen_length, batch.chosen.mask.sum(1))
    np.testing.assert_array_equal(got.rejected_length, batch.rejected.mask.sum(1))
    np.testing.assert_array_equal(got.weight, batch.weight)


def test_lengths_of_one_and_full_rows_are_in_the_batch():
    batch = random_batch()
    for tokens in (batch.prompt, batch.chosen, batch.rejected):
        lengths = tokens.mask.sum(1)
        assert lengths.min() == 1
        assert lengths.max() == tokens.mask.shape[1]


def test_the_width_of_the_padding_changes_nothing():
    policy, batch = Recurrent(jax.random.key(0)), random_batch()

    def wider(tokens, by):
        pad = [(0, 0), (0, by)]
        return dpx.Tokens(np.pad(tokens.ids, pad, constant_values=99), np.pad(tokens.mask, pad))

    padded = dataclasses.replace(
        batch,
        prompt=wider(batch.prompt, 3),
        chosen=wider(batch.chosen, 4),
        rejected=wider(batch.rejected, 4),
    )
    assert_close(score(policy, padded), score(policy, batch), 1e-12)


def test_the_fast_path_equals_the_plain_one():
    policy, batch = Attention(jax.random.key(0)), gappy(random_batch(2))

    @eqx.filter_value_and_grad
    def objective(policy):
        scored = score(policy, batch)
        return (jnp.arange(8.0) * (scored.chosen - 2 * scored.rejected)).sum()

    fast_value, fast_gradient = objective(policy)
    plain_value, plain_gradient = objective(Plain(policy))
    assert_close(score(policy, batch), score(Plain(policy), batch), 1e-12)
    assert_close((fast_value, fast_gradient), (plain_value, plain_gradient.policy), 1e-11)


def test_ids_of_another_width():
    policy, batch = Attention(jax.random.key(0)), random_batch()
    narrow = jax.tree.map(lambda x: x.astype(np.int32) if x.dtype == np.int64 else x, batch)
    assert_close(score(policy, narrow), score(policy, batch), 1e-15)


@pytest.mark.parametrize("options", [{"bias": False, "softcap": None}, {"softcap": None}])
def test_the_fast_path_without_bias_or_softcap(options):
    policy, batch = Attention(jax.random.key(0), **options), random_batch()
    assert_close(score(policy, batch), score(Plain(policy), batch), 1e-12)


def test_the_fast_path_is_taken_where_it_is_offered():
    calls = []

    class Recorded(Attention):
        def hidden(self, ids, layout, *, key=None):
            calls.append((ids.size, layout.prompt_width, layout.completion_widths))
            return super().hidden(ids, layout, key=key)

    dpx.score_pairs(Recorded(jax.random.key(0)), random_batch())
    assert calls == [(5 + 6 + 6, 5, (6, 6))]


def test_a_layer_named_hidden_is_no_fast_path():
    class Misleading(eqx.Module):
        hidden: eqx.nn.Linear
        unembedding: jax.Array

        def __call__(self, ids):
            return jax.nn.one_hot(ids, 4) @ self.hidden.weight.T @ self.unembedding.T

    a, b = jax.random.split(jax.random.key(0))
    policy = Misleading(eqx.nn.Linear(4, 3, key=a), jax.random.normal(b, (VOCAB, 3)))
    assert np.isfinite(dpx.score_pairs(policy, random_batch()).chosen).all()


def test_keys_are_one_for_each_pair():
    policy, batch = Perceptron(jax.random.key(0), rate=0.5), random_batch()
    keys = jax.random.split(jax.random.key(7), 8)
    whole = score(policy, batch, key=jax.random.key(7))
    assert_close(score(policy, batch, key=keys), whole, 1e-15)
    half = jax.tree.map(lambda x: x[4:], batch)
    assert_close(score(policy, half, key=keys[4:]), jax.tree.map(lambda x: x[4:], whole), 1e-12)
    raw = jax.random.key_data(keys)
    assert_close(score(policy, batch, key=raw), whole, 1e-15)
    other = score(policy, batch, key=jax.random.key(8))
    assert not np.allclose(other.chosen, whole.chosen)


def test_unpaired_completions():
    policy, pairs = Recurrent(jax.random.key(0)), random_batch()
    rng = np.random.default_rng(3)
    label = rng.random(8) < 0.5
    mismatched = random_tokens(rng, prefix_masks(rng.integers(1, 4, 8), 3))
    batch = dpx.UnpairedBatch(pairs.prompt, pairs.chosen, label, kl=mismatched, weight=pairs.weight)
    got = eqx.filter_jit(dpx.score_unpaired)(policy, batch)
    want = np.array(brute_force.scores(policy, pairs))[:, 0]
    np.testing.assert_allclose(got.completion, want, rtol=1e-10)
    padded = dpx.Tokens(
        np.pad(mismatched.ids, [(0, 0), (0, 3)]), np.pad(mismatched.mask, [(0, 0), (0, 3)])
    )
    as_pairs = dpx.PreferenceBatch(pairs.prompt, padded, padded)
    np.testing.assert_allclose(
        got.kl, np.array(brute_force.scores(policy, as_pairs))[:, 0], rtol=1e-10
    )
    np.testing.assert_array_equal(got.label, label)
    without = dpx.score_unpaired(policy, dataclasses.replace(batch, kl=None))
    assert without.kl is None
    np.testing.assert_allclose(without.completion, want, rtol=1e-10)


def test_unpaired_completions_by_the_fast_path():
    policy, pairs = Attention(jax.random.key(0)), random_batch()
    rng = np.random.default_rng(3)
    kl = random_tokens(rng, prefix_masks(rng.integers(1, 4, 8), 3))
    batch = dpx.UnpairedBatch(pairs.prompt, pairs.chosen, np.ones(8, bool), kl=kl)
    score = eqx.filter_jit(dpx.score_unpaired)
    assert_close(score(policy, batch), score(Plain(policy), batch), 1e-12)


def confidence_by_definition(policy, batch):
    out = []
    for prompt, *pair in brute_force.sequences(batch):
        row = []
        for completion, scored in pair:
            logits = np.array(brute_force.recurrent_logits(policy, [*prompt, *completion]))
            logits = logits[len(prompt) - 1 :][: len(completion)][np.array(scored, bool)]
            probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            picked = probs[np.arange(len(probs)), np.array(completion)[np.array(scored, bool)]]
            row.append(np.exp(np.mean(np.log(picked / (probs**2).sum(-1)))))
        out.append(row)
    return np.array(out)


def test_confidences():
    policy, batch = Recurrent(jax.random.key(0)), random_batch()
    got = score(policy, batch, confidence=True)
    want = confidence_by_definition(policy, batch)
    np.testing.assert_allclose(got.chosen_confidence, want[:, 0], rtol=1e-10)
    np.testing.assert_allclose(got.rejected_confidence, want[:, 1], rtol=1e-10)
    fast, plain = Attention(jax.random.key(0)), Plain(Attention(jax.random.key(0)))
    assert_close(score(fast, batch, confidence=True), score(plain, batch, confidence=True), 1e-12)


def test_no_gradient_flows_through_confidences():
    batch = random_batch()

    def total(policy):
        scored = dpx.score_pairs(policy, batch, confidence=True)
        return scored.chosen_confidence.sum() + scored.rejected_confidence.sum()

    for policy in (Recurrent(jax.random.key(0)), Attention(jax.random.key(0))):
        for leaf in jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(total))(policy)):
            np.testing.assert_array_equal(leaf, 0)


def test_a_scored_id_outside_the_vocabulary_is_nan():
    batch = random_batch()
    ids = batch.chosen.ids.copy()
    ids[3, 0] = VOCAB
    batch = dataclasses.replace(batch, chosen=dpx.Tokens(ids, batch.chosen.mask))
    for policy in (Attention(jax.random.key(0)), Plain(Attention(jax.random.key(0)))):
        got = dpx.score_pairs(policy, batch)
        np.testing.assert_array_equal(np.isnan(got.chosen), np.arange(8) == 3)
        assert np.isfinite(got.rejected).all()


class Batched(eqx.Module):
    def __call__(self, ids):
        return jnp.zeros((1, ids.size, VOCAB))


class Narrow(Attention):
    def hidden(self, ids, layout, *, key=None):
        return super().hidden(ids, layout)[:, :-1]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Batched(), r"`\(length, vocab\)`, here \(11, vocab\) .* got \(1, 11, 11\)"),
        (lambda ids: jnp.zeros((ids.size - 1, VOCAB)), r"got \(10, 11\)"),
        (Narrow(jax.random.key(0)), r"here \(17, 8\) .* got \(17, 7\)"),
    ],
)
def test_a_policy_that_returns_something_else(policy, message):
    with pytest.raises(ValueError, match=message):
        dpx.score_pairs(policy, random_batch())


def test_a_wrong_number_of_keys():
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match=r"one for each of the 8 pairs; got shape \(3,\)"):
        dpx.score_pairs(Perceptron(jax.random.key(0)), random_batch(), key=keys)
