"""Evaluation: exact over ragged batches, for pairs and for unpaired completions."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx.losses import dpo

from .policies import Perceptron, assert_close, random_batch

POLICY, REFERENCE = Perceptron(jax.random.key(0)), Perceptron(jax.random.key(1))
BATCH = random_batch()
evaluate = eqx.filter_jit(dpx.make_eval(dpo))


def test_the_metrics_are_those_of_a_step():
    want = eqx.filter_jit(dpx.make_grad(dpo))(POLICY, BATCH, REFERENCE)[1]
    want.pop("grad_norm")
    assert_close(evaluate(POLICY, BATCH, REFERENCE).mean(), want, 1e-12)


def test_ragged_batches_add_up():
    parts = [jax.tree.map(lambda x, p=p: x[p], BATCH) for p in (slice(0, 3), slice(3, 8))]
    last = dataclasses.replace(parts[0], weight=np.zeros(3))
    total = sum(evaluate(POLICY, part, REFERENCE) for part in [*parts, last])
    assert_close(total, evaluate(POLICY, BATCH, REFERENCE), 1e-12)


def test_the_policy_is_in_inference_mode():
    dropping = Perceptron(jax.random.key(0), rate=0.5)
    assert_close(evaluate(dropping, BATCH, REFERENCE), evaluate(POLICY, BATCH, REFERENCE), 1e-15)


def test_nothing_counted_is_zero():
    empty = dataclasses.replace(BATCH, weight=np.zeros(8))
    for value in evaluate(POLICY, empty, REFERENCE).mean().values():
        assert value == 0


def unpaired_loss(policy, reference, *, beta=0.1):
    """One formula for both labels is enough here."""
    rho = policy.completion - reference.completion
    sign = jnp.where(policy.label, 1.0, -1.0)
    return dpx.UnpairedLoss(-jax.nn.log_sigmoid(sign * beta * rho), beta * rho)


def test_unpaired_rewards_have_their_own_weights():
    label = np.arange(8) % 3 == 0
    batch = dpx.UnpairedBatch(BATCH.prompt, BATCH.chosen, label, weight=BATCH.weight)
    run = eqx.filter_jit(dpx.make_eval(unpaired_loss, score=dpx.score_unpaired))
    means = run(POLICY, batch, REFERENCE).mean()
    ours, theirs = (eqx.filter_jit(dpx.score_unpaired)(p, batch) for p in (POLICY, REFERENCE))
    reward = 0.1 * (ours.completion - theirs.completion)
    for name, mask in {"chosen": label, "rejected": ~label}.items():
        weight = batch.weight * mask
        want = (weight * reward).sum() / weight.sum()
        np.testing.assert_allclose(means[f"rewards/{name}"], want, rtol=1e-12)
        want = (weight * ours.completion).sum() / weight.sum()
        np.testing.assert_allclose(means[f"logps/{name}"], want, rtol=1e-12)
    margin = means["rewards/chosen"] - means["rewards/rejected"]
    np.testing.assert_allclose(means["rewards/margins"], margin)
    assert "rewards/accuracies" not in means
    halves = [jax.tree.map(lambda x, s=s: x[s], batch) for s in (slice(0, 2), slice(2, 8))]
    assert_close(sum(run(POLICY, half, REFERENCE) for half in halves).mean(), means, 1e-12)
    grad = dpx.make_grad(unpaired_loss, score=dpx.score_unpaired, microbatches=4)
    _, step_metrics = eqx.filter_jit(grad)(POLICY, batch, REFERENCE)
    step_metrics.pop("grad_norm")
    assert_close(step_metrics, means, 1e-12)


def test_metrics_of_other_names_do_not_add():
    one = dpx.Metrics({"loss": jnp.ones(())}, {"loss": jnp.ones(())})
    other = dpx.Metrics({"lose": jnp.ones(())}, {"lose": jnp.ones(())})
    with pytest.raises(ValueError, match=r"same names; got \['loss'\] and \['lose'\]"):
        one + other
