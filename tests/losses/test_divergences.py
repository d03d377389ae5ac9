"""Divergences against their formulas, and their linear continuation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import losses
from dpo_eqx.losses._numerics import exponential, square

from .cases import CASES, DIVERGENCES, close, draw, gradient, records

A = 0.7
FORMULAS = {
    "reverse_kl": lambda rho: rho,
    "forward_kl": lambda rho: 1 - np.exp(-rho),
    "jensen_shannon": lambda rho: np.log(2) - np.logaddexp(0, -rho),
    "alpha_divergence": lambda rho: (1 - np.exp(-A * rho)) / A,
}
RHO = np.array([-50.0, -3.0, -1e-3, 0.0, 2.0, 50.0])
OF_DIFFERENCE = [case for case in CASES if case.divergence]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_formula(name):
    np.testing.assert_allclose(
        DIVERGENCES[name](jnp.asarray(RHO)), FORMULAS[name](RHO), rtol=1e-13, atol=1e-16
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_slope_at_the_reference_is_1_over_f_and_never_0(name):
    """f''(1): 1, but 1/2 of Jensen-Shannon; and every slope is positive."""
    slope = jax.grad(lambda x: DIVERGENCES[name](x).sum())
    slopes = slope(jnp.asarray([0.0, -1e4, -100.0, -1.0, 1.0, 20.0]))
    close(slopes[0], 0.5 if name == "jensen_shannon" else 1)
    assert (slopes > 0).all()


@pytest.mark.parametrize("case", OF_DIFFERENCE, ids=lambda case: case.name)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_losses_take_scores_in_place_of_log_ratios(case, name):
    """A loss with a divergence is the loss of log-ratios that are the scores."""
    p = draw(case)
    w, l = p.rhos  # noqa: E741
    scored = p._replace(lw=FORMULAS[name](w), ll=FORMULAS[name](l), rw=0 * w, rl=0 * l)
    loss, *slopes = case.oracle(scored, **case.hyper)
    result, got = gradient(case.loss, *records(case, p), divergence=DIVERGENCES[name], **case.hyper)
    close(result.loss, loss)
    close((result.chosen_reward, result.rejected_reward), case.reward(p, case.hyper["beta"]))
    chain = jax.grad(lambda x: DIVERGENCES[name](x).sum())
    for slope, want, rho in zip(got, slopes, (w, l), strict=True):
        close(slope, want * np.asarray(chain(jnp.asarray(rho))), 1e-11)


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 40.0), (jnp.float64, 300.0)])
def test_exponentials_go_on_as_tangents(dtype, limit):
    step = np.array([0.0, 0.5, 1.0, 3.0, 10.0, 100.0])
    want = np.exp(limit) * (1 + step)
    x = jnp.asarray(limit + step, dtype)
    np.testing.assert_allclose(exponential(x), want, rtol=1e-5)
    np.testing.assert_allclose(losses.forward_kl(-x), 1 - want, rtol=1e-5)
    twice = losses.alpha_divergence(2.0)
    np.testing.assert_allclose(twice(-x / 2), (1 - want) / 2, rtol=1e-5)
    np.testing.assert_allclose(
        jax.grad(lambda x: exponential(x).sum())(x), np.exp(limit), rtol=1e-5
    )
    slope = jax.grad(lambda x: losses.forward_kl(x).sum())(-x)
    np.testing.assert_allclose(slope, np.exp(limit), rtol=1e-5)


def test_below_the_limit_nothing_is_changed():
    x = np.array([-1000.0, 39.9, 299.0])
    np.testing.assert_allclose(exponential(jnp.asarray(x)), np.exp(x), rtol=1e-15)
    large = np.array([-1e14, 0.0, 3.0, 1e14])
    np.testing.assert_array_equal(square(jnp.asarray(large)), large**2)


def test_square_goes_on_as_its_tangent():
    x, limit = jnp.asarray([-1e20, 1e20], jnp.float32), 1e15
    np.testing.assert_allclose(square(x), limit * (2e20 - limit), rtol=1e-6)
    slope = jax.grad(lambda x: square(x).sum())(x)
    np.testing.assert_allclose(slope, [-2 * limit, 2 * limit], rtol=1e-6)


def test_alpha_divergence_between_the_two_kls():
    rho = jnp.asarray(RHO)
    np.testing.assert_allclose(losses.alpha_divergence(1)(rho), losses.forward_kl(rho), rtol=1e-14)
    np.testing.assert_array_equal(losses.alpha_divergence(0)(rho), rho)
    np.testing.assert_allclose(losses.alpha_divergence(1e-9)(rho), rho, rtol=1e-7)


@pytest.mark.parametrize("a", [0.0, 0.3, -0.4])
def test_alpha_divergence_is_differentiable_in_its_coefficient(a):
    rho, step = jnp.asarray([-2.0, -0.5, -0.1, 0.5, 1.0, 3.0]), 1e-5
    slope = jax.jacobian(lambda a: losses.alpha_divergence(a)(rho))(a)
    ends = [losses.alpha_divergence(a + sign * step)(rho) for sign in (1, -1)]
    close(slope, (ends[0] - ends[1]) / (2 * step), 1e-6)


def test_alpha_divergence_per_pair():
    rho, a = jnp.asarray([1.0, 1.0, -2.0]), jnp.asarray([0.0, 0.5, 1.0])
    close(losses.alpha_divergence(a)(rho), [1.0, (1 - np.exp(-0.5)) / 0.5, 1 - np.exp(2)])
