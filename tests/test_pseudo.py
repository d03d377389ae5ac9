"""Pseudo-log-likelihoods against a loop that masks one position at a time."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses

from .policies import VOCAB, random_batch

MASK = 10
BATCH = random_batch(pairs=3, prompt=3, completion=4)


class Masked(eqx.Module):
    """Sees the whole row, without the padding 0."""

    embedding: jax.Array
    head: jax.Array

    def __call__(self, ids, *, key=None):
        x = self.embedding[ids] * (ids != 0)[:, None].astype(self.embedding.dtype)
        return jnp.tanh(x + x.sum(axis=0, keepdims=True)) @ self.head


def masked(seed):
    rng = np.random.default_rng(seed)
    return Masked(
        jnp.asarray(rng.normal(size=(VOCAB, 4))), jnp.asarray(rng.normal(size=(4, VOCAB)))
    )


POLICY = masked(0)


def by_hand(policy, batch, side, groups):
    """One sequence, one group and one position at a time, without padding."""
    totals = []
    for i in range(batch.pairs):
        prompt = np.asarray(batch.prompt.ids[i])[np.asarray(batch.prompt.mask[i])]
        tokens = getattr(batch, side)
        completion = np.asarray(tokens.ids[i])[np.asarray(tokens.mask[i])]
        row, total = np.concatenate([prompt, completion]), 0.0
        for group in range(groups):
            places = np.arange(group, completion.size, groups) + prompt.size
            hidden = row.copy()
            hidden[places] = MASK
            x = np.asarray(policy.embedding)[hidden] * (hidden != 0)[:, None]
            logits = np.tanh(x + x.sum(0)) @ np.asarray(policy.head)
            for t in places:
                total += logits[t, row[t]] - np.log(np.exp(logits[t]).sum())
        totals.append(total)
    return np.array(totals)


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_against_one_position_at_a_time(groups):
    score = eqx.filter_jit(dpx.pseudo_score(MASK, groups=groups))
    got = score(POLICY, BATCH)
    for side in ("chosen", "rejected"):
        want = by_hand(POLICY, BATCH, side, groups or 4)
        np.testing.assert_allclose(getattr(got, side), want, rtol=1e-10)
        lengths = getattr(BATCH, side).mask.sum(axis=1)
        np.testing.assert_array_equal(getattr(got, f"{side}_length"), lengths)


def test_in_a_step_and_in_what_compares():
    score, reference = dpx.pseudo_score(MASK), masked(1)
    grad = eqx.filter_jit(dpx.make_grad(losses.dpo, score=score))
    gradients, metrics = grad(POLICY, BATCH, reference)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients))
    compared = eqx.filter_jit(dpx.compare)(POLICY, reference, BATCH, score=score)
    want = np.average(compared.policy.chosen, weights=BATCH.weight)
    np.testing.assert_allclose(metrics["logps/chosen"], want, rtol=1e-12)
    assert isinstance(compared, dpx.ScoredComparison)
    np.testing.assert_allclose(
        compared.reference.rejected, by_hand(reference, BATCH, "rejected", 4), rtol=1e-10
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mask_id": -1}, "`mask_id` must be .*got -1"), ({"mask_id": 1, "groups": 0}, "got 0")],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        dpx.pseudo_score(**options)
