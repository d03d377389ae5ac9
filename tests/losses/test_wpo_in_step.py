"""WPO in a step: the gradient of the weighted loss, with the confidences held."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpo_eqx as dpx
from dpo_eqx import losses

from ..policies import Perceptron, arrays, assert_close, random_batch

POLICY, REFERENCE = Perceptron(jax.random.key(0)), Perceptron(jax.random.key(1))
BETA = 0.4
BATCH = random_batch(pairs=3, weight=np.array([0.5, 0.0, 2.0]))


def sequence(policy, row, tokens):
    """The log-probability of one completion, and the mean of log p - log sum p^2."""
    prompt = BATCH.prompt.ids[row][BATCH.prompt.mask[row]]
    completion = tokens.ids[row][tokens.mask[row]]
    logits = policy(jnp.concatenate([prompt, completion]))[len(prompt) - 1 : -1]
    p = jnp.exp(logits) / jnp.exp(logits).sum(axis=1, keepdims=True)
    log_p = jnp.log(p[jnp.arange(len(completion)), completion])
    return log_p.sum(), (log_p - jnp.log((p**2).sum(axis=1))).mean()


def by_hand(policy, held):
    """The mean loss of the pairs, one by one, with the confidences of the policy `held`."""
    total = 0.0
    for row in np.flatnonzero(BATCH.weight):
        rhos, excess = [], 0.0
        for tokens in (BATCH.chosen, BATCH.rejected):
            rhos.append(sequence(policy, row, tokens)[0] - sequence(REFERENCE, row, tokens)[0])
            excess += sequence(held, row, tokens)[1]
        loss = jnp.log1p(jnp.exp(-BETA * (rhos[0] - rhos[1])))
        total += BATCH.weight[row] * jnp.exp(excess) * loss
    return total / BATCH.weight.sum()


def test_the_step_follows_the_gradient_with_confidences_held():
    sgd = optax.sgd(0.5)
    step = dpx.make_step(
        losses.wpo(partial(losses.dpo, beta=BETA)),
        sgd,
        score=partial(dpx.score_pairs, confidence=True),
    )
    policy, _, metrics = eqx.filter_jit(step)(POLICY, sgd.init(arrays(POLICY)), BATCH, REFERENCE)
    loss, gradient = eqx.filter_jit(eqx.filter_value_and_grad(by_hand))(POLICY, POLICY)
    want = jax.tree.map(lambda p, g: p - 0.5 * g, arrays(POLICY), arrays(gradient))
    assert_close(policy, want, 1e-12)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
