"""Length-desensitised scores: against TRL's own values, and by a loop over tokens."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log1mexp

import dpo_eqx as dpx
from dpo_eqx import losses

from ..policies import Attention, Perceptron, Plain, assert_close, random_batch
from .golden import GOLDEN, agree

LD = [case for case in GOLDEN["dpo_token"] if "ld_alpha" in case]


class Prescribed(eqx.Module):
    """A policy whose token log-probabilities are those of a table.

    An id names its row and column of the table: the next token has the probability that stands
    there, and one more token, the last of the vocabulary, all the rest.
    """

    log_probs: jax.Array

    def __call__(self, ids):
        known = self.log_probs.ravel()[jnp.maximum(jnp.roll(ids, -1) - 1, 0)]
        # The first column of ids is the prompt's; the last token predicts nothing.
        logits = jnp.full((ids.size, self.log_probs.size + 2), -jnp.inf)
        logits = logits.at[jnp.arange(ids.size), jnp.roll(ids, -1)].set(known)
        return logits.at[:, -1].set(log1mexp(-known))


@pytest.fixture(scope="module")
def golden():
    """TRL's tokens as a batch with a prompt of one token, a policy and a reference."""
    x = GOLDEN["token_inputs"]
    policy, reference = (Prescribed(jnp.asarray(x[f"{p}_token_logps"])) for p in ("policy", "ref"))
    ids = 1 + np.arange(policy.log_probs.size).reshape(policy.log_probs.shape)
    mask = np.array(x["completion_mask"], bool)[:, 1:]
    chosen, rejected = map(dpx.Tokens, np.split(ids, 2), np.split(mask, 2))
    prompt = dpx.Tokens(np.zeros((4, 1), int), np.ones((4, 1), bool))
    return policy, dpx.PreferenceBatch(prompt, chosen, rejected), reference


@pytest.fixture(scope="module")
def run(golden):
    """Metrics of each pair, and the gradient of the mean loss, at a `beta` and an `alpha`."""

    @jax.jit
    def run(beta, alpha):
        score = dpx.ld_score(alpha)
        records = [score(model, golden[1]) for model in golden[::2]]
        grad = dpx.make_grad(partial(losses.dpo, beta=beta), score=score)
        return losses.dpo(*records, beta=beta), records[0], grad(*golden)

    return run


@pytest.mark.parametrize("case", LD, ids=lambda case: case["id"])
def test_values_and_gradients_of_trl(case, golden, run):
    result, record, (slopes, metrics) = run(case["beta"], case["ld_alpha"])
    agree(record.chosen, case["chosen_logps"], case)
    agree(record.rejected, case["rejected_logps"], case)
    agree(result.loss, case["losses"], case)
    agree(result.chosen_reward, case["chosen_rewards"], case)
    agree(result.rejected_reward, case["rejected_rewards"], case)
    agree(metrics["loss"], case["loss_mean"], case)
    mask = np.concatenate([golden[1].chosen.mask, golden[1].rejected.mask])
    want = np.where(mask, case["grad_policy_token_logps"], 0)
    np.testing.assert_allclose(slopes.log_probs, want, rtol=1e-10, atol=1e-14)


def ragged(gaps):
    """Completions of lengths 1 to 6, and with gaps: an empty one, and context between."""
    batch = random_batch(pairs=6)
    if not gaps:
        return batch
    masks = [tokens.mask.copy() for tokens in (batch.chosen, batch.rejected)]
    rng = np.random.default_rng(2)
    for row, mask in enumerate(masks):
        mask &= rng.random(mask.shape) < 0.7
        mask[row] = False
    chosen, rejected = (
        dpx.Tokens(np.where(tokens.mask, tokens.ids, -7), mask)
        for tokens, mask in zip((batch.chosen, batch.rejected), masks, strict=True)
    )
    return dataclasses.replace(batch, chosen=chosen, rejected=rejected)


def token_by_token(policy, batch, alpha):
    """Each pair alone, without padding, one token after the other."""
    call, rows = eqx.filter_jit(policy), []
    for row in range(batch.pairs):
        prompt = batch.prompt.ids[row][batch.prompt.mask[row]]
        pair = [(tokens.ids[row], tokens.mask[row]) for tokens in (batch.chosen, batch.rejected)]
        shorter = min(mask.sum() for _, mask in pair)
        sums = []
        for ids, mask in pair:
            total = 0.0
            logits = np.asarray(call(np.concatenate([prompt, np.maximum(ids, 0)])), np.float64)
            for scored, step in enumerate(np.flatnonzero(mask), start=1):
                before = logits[len(prompt) + step - 1]
                log_prob = before[ids[step]] - np.log(np.exp(before).sum())
                total += log_prob if scored <= shorter else alpha * log_prob
            sums.append(total)
        rows.append(sums)
    return np.array(rows)


@pytest.mark.parametrize("gaps", [False, True], ids=["ragged", "gappy"])
def test_token_by_token(gaps):
    policy, batch = Perceptron(jax.random.key(0)), ragged(gaps)
    score = eqx.filter_jit(lambda policy, alpha: dpx.ld_score(alpha)(policy, batch))
    for alpha in (0.0, 0.3, 1.0):
        got = score(policy, jnp.asarray(alpha))
        want = token_by_token(policy, batch, alpha)
        np.testing.assert_allclose(got.chosen, want[:, 0], rtol=1e-12)
        np.testing.assert_allclose(got.rejected, want[:, 1], rtol=1e-12)
    assert_close(got, eqx.filter_jit(dpx.score_pairs)(policy, batch), 1e-13)


def test_the_fast_path():
    policy, batch = Attention(jax.random.key(0)), ragged(True)
    score = eqx.filter_jit(dpx.ld_score(0.3))
    assert_close(
        score(policy, batch, chunk_size=4), score(Plain(policy), batch, chunk_size=None), 1e-12
    )


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=rf"`alpha` must be in \[0, 1\]; got {alpha}"):
        dpx.ld_score(alpha)
