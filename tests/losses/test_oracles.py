"""Values, rewards and gradients of each loss against float64 NumPy written from the papers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from .cases import CASES, NAMES, close, draw, gradient, join, records, split

table = pytest.mark.parametrize("case", CASES, ids=NAMES)


@table
@pytest.mark.parametrize("defaults", [True, False], ids=["defaults", "others"])
def test_value_reward_and_closed_form_gradient(case, defaults):
    p = draw(case)
    hyper = case.needed if defaults else case.hyper
    result, slopes = gradient(case.loss, *records(case, p), **hyper)
    loss, *want = case.oracle(p, **hyper)
    close(result.loss, loss)
    for got, expected in zip(slopes, want, strict=True):
        close(got, expected)


@table
def test_rewards(case):
    p = draw(case)
    result = case.loss(*records(case, p), **case.hyper)
    want = case.reward(p, case.hyper.get("beta"))
    got = result.reward if case.unpaired else (result.chosen_reward, result.rejected_reward)
    close(got, want)


@table
def test_float32_is_kept_and_agrees(case):
    p = draw(case)
    result = case.loss(*records(case, p, jnp.float32), **case.hyper)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(result))
    close(result.loss, case.oracle(p, **case.hyper)[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.smooth],
    ids=[name for case, name in zip(CASES, NAMES, strict=True) if case.smooth],
)
def test_finite_differences_to_second_order(case):
    policy, reference = records(case, draw(case))
    floats, rest = split(policy)
    # A detached `beta_b` is no function's derivative: with `alpha` 0 it does not move.
    hyper = case.hyper | ({"alpha": 0.0} if case.name == "beta_dpo" else {})
    check_grads(
        lambda *x: case.loss(join(x, rest), reference, **hyper).loss,
        floats,
        order=2,
        modes=["rev"],
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.at_reference is not None],
    ids=[n for case, n in zip(CASES, NAMES, strict=True) if case.at_reference is not None],
)
def test_identity_with_the_policy_at_the_reference(case):
    _, reference = records(case, draw(case))
    result = case.loss(reference, reference)
    np.testing.assert_allclose(result.loss, case.at_reference, rtol=1e-15)
    for reward in jax.tree.leaves(result)[1:]:
        np.testing.assert_array_equal(reward, 0)


def test_identity_of_the_losses_without_a_reference():
    """With both completions alike, only the fixed part of the margin is left."""
    from dpo_eqx import losses

    from .oracles import Pairs

    x, n = np.array([-3.0, -8.0]), np.array([2.0, 16.0])
    policy, _ = records(CASES[0], Pairs(x, x, x, x, n, n))
    softplus = partial(np.logaddexp, 0)
    close(losses.simpo(policy, None, gamma=0.7).loss, softplus(0.7))
    close(losses.alpha_po(policy, None, gamma=0.7).loss, softplus(0.7))
    close(losses.cpo(policy, None).loss, np.log(2) - x / n)
    close(losses.orpo(policy, None).loss, 0.1 * np.log(2) - x / n)
    close(losses.r_dpo(policy, policy).loss, np.log(2))


@table
def test_no_gradient_flows_into_the_reference(case):
    policy, reference = records(case, draw(case))
    if reference is None:
        return
    floats, rest = split(reference)
    slopes = jax.grad(
        lambda *x: case.loss(policy, join(x, rest), **case.hyper).loss.sum(),
        argnums=tuple(range(len(floats))),
    )(*floats)
    for slope in slopes:
        np.testing.assert_array_equal(slope, 0)
