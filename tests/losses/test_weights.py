"""A pair's weight at exactly 0: the pair has no influence, and its derivative is right.

The objective is `sum(w * l) / sum(w)`, so its derivative with respect to `w_i` is
`(l_i - mean) / sum(w)`, at a weight of 0 too: whoever learns the weights starts there. Checked
against one-sided differences. Not for `aot`: a pair enters its sort by a jump, so there is none.
"""

import dataclasses
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses
from dpo_eqx.losses._marks import is_coupled

from .cases import CASES, NAMES, close, draw, records

WEIGHT = np.array([0.7, 0.0, 1.4, 0.0, 0.3, 2.0])
REMOVED = WEIGHT == 0
QUICK = {"dpo", "orpo", "beta_dpo", "kto"}  # of each kind one; the others are compiled slowly
ROWS = [
    pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for case, name in zip(CASES, NAMES, strict=True)
]
table = pytest.mark.parametrize("case", ROWS)


class Given(eqx.Module):
    """A batch for the score below: all that it needs is in the policy."""

    weight: Any
    reference: Any
    per_pair: None = None

    @property
    def pairs(self):
        return self.weight.size


def as_they_are(policy, batch, *, key=None):
    """A score for policies that are log-probabilities themselves."""
    return dataclasses.replace(policy, weight=batch.weight)


def step_of(loss, policy, reference):
    """The gradient and the metrics, as a function of the weights."""
    grad = dpx.make_grad(loss, score=as_they_are)
    return lambda weight: grad(policy, Given(weight, reference))


def one_sided(function, at, row, step=1e-4):
    """The derivative with respect to `at[row]`, of third order, from values at `at` and above."""
    values = [function(at.at[row].add(k * step)) for k in range(4)]
    return jax.tree.map(lambda a, b, c, d: (-11 * a + 18 * b - 9 * c + 2 * d) / (6 * step), *values)


@table
def test_derivative_with_respect_to_a_weight_of_0(case):
    """Of every metric and of the gradients: the loss of a pair is that of its own numbers."""
    if "aot" in case.name:
        return
    policy, reference = records(case, draw(case))
    step = eqx.filter_jit(step_of(partial(case.loss, **case.hyper), policy, reference))
    weight = jnp.asarray(WEIGHT)
    for row in np.flatnonzero(REMOVED):
        direction = jnp.zeros_like(weight).at[row].set(1)
        _, slopes = jax.jvp(step, (weight,), (direction,))
        for got, want in zip(
            *map(jax.tree.leaves, (slopes, one_sided(step, weight, row))), strict=True
        ):
            close(got, want, 1e-7)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_derivative_of_the_loss_in_closed_form(case):
    """In reverse mode, and against the oracle of each pair alone."""
    if is_coupled(case.loss):
        return
    p = draw(case)
    step = step_of(partial(case.loss, **case.hyper), *records(case, p))
    slopes = jax.grad(lambda weight: step(weight)[1]["loss"])(jnp.asarray(WEIGHT))
    each = case.oracle(p, **case.hyper)[0]
    mean = (WEIGHT * each).sum() / WEIGHT.sum()
    close(slopes, (each - mean) / WEIGHT.sum(), 1e-10)


def test_derivative_in_evaluation():
    case = CASES[0]
    p = draw(case)
    policy, reference = records(case, p)
    evaluate = dpx.make_eval(losses.dpo, score=as_they_are)

    def loss(weight):
        return evaluate(policy, Given(weight, reference)).mean()["loss"]

    each = case.oracle(p)[0]
    mean = (WEIGHT * each).sum() / WEIGHT.sum()
    close(jax.grad(loss)(jnp.asarray(WEIGHT)), (each - mean) / WEIGHT.sum())


def spoiled(record, value):
    """`record` with `value` for every number of the pairs of weight 0."""
    floats, rest = eqx.partition(record, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda x: jnp.where(REMOVED, value, x), floats), rest)


@table
def test_a_pair_of_weight_0_may_hold_anything(case):
    """NaN, infinities, the largest numbers: the rest is exactly as without it, derivatives too."""
    loss = partial(case.loss, **case.hyper)
    policy, reference = records(case, draw(case))

    @eqx.filter_jit
    def everything(policy, reference, weight):
        step = step_of(loss, policy, reference)
        slopes = jax.grad(lambda weight: step(weight)[1]["loss"])(weight)
        return *step(weight), jnp.where(REMOVED, 0, slopes)

    weight = jnp.asarray(WEIGHT)
    want = everything(policy, reference, weight)
    for value in (np.nan, np.inf, -np.inf, np.finfo(float).min, np.finfo(float).max):
        got = everything(spoiled(policy, value), spoiled(reference, value * 0.5), weight)
        for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            assert np.isfinite(ours).all()
            close(ours, theirs, 1e-14)


def test_a_loss_that_overflows_at_weight_0_is_removed():
    """A user's loss whose value and slope are infinite, for numbers that are finite."""

    def bursting(policy, reference):
        return losses.PairLoss(jnp.exp(-policy.chosen), policy.chosen, policy.rejected)

    policy = dpx.PairLogProbs(jnp.asarray([-1.0, -1e4]), jnp.zeros(2))
    gradients, metrics = step_of(bursting, policy, None)(jnp.asarray([1.0, 0.0]))
    close(metrics["loss"], np.e)
    close(gradients.chosen, [-np.e, 0])


def test_weights_that_are_all_0():
    policy, reference = records(CASES[0], draw(CASES[0]))
    step = step_of(losses.dpo, policy, reference)
    gradients, metrics = step(jnp.zeros(6))
    for x in jax.tree.leaves((gradients, metrics["loss"])):
        np.testing.assert_array_equal(x, 0)
    assert np.isfinite(jax.grad(lambda weight: step(weight)[1]["loss"])(jnp.zeros(6))).all()


def test_a_narrow_loss_is_averaged_in_float32():
    """In float16 the weights themselves would be infinite."""

    def narrow(policy, reference):
        result = losses.dpo(policy, reference)
        return dataclasses.replace(result, loss=result.loss.astype(jnp.float16))

    zeros = jnp.zeros(2, jnp.float32)
    policy = dpx.PairLogProbs(zeros, zeros)
    gradients, _ = step_of(narrow, policy, policy)(jnp.full(2, 1e5))
    np.testing.assert_allclose(gradients.chosen, -0.05 / 2, rtol=1e-6)
