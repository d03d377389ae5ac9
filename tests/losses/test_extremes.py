"""Values and gradients stay finite: huge margins, lengths 0 and 1, corners."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import PairLogProbs, losses

from .cases import CASES, DIVERGENCES, NAMES, gradient, records
from .oracles import Pairs, Singles

SIZES = np.array([0.0, 1e-3, 1.0, 17.0, 90.0, 1e3, 1e4, 1e5])
RHOS = np.concatenate([-SIZES[::-1], SIZES])  # with beta 0.1, rewards up to 1e4
GRID = np.array(list(itertools.product(RHOS, RHOS))).T


def as_many(values):
    """Repeated to as many rows as the grid has, so that nothing is compiled for another shape."""
    return np.resize(values, GRID.shape[1])


def extreme(case, lengths=(1.0, 1.0)):
    zeros = np.zeros(len(GRID[0]))
    if case.unpaired:
        return Singles(GRID[0], zeros, GRID[1], zeros, np.arange(len(zeros)) % 2 == 0)
    counts = [np.full_like(zeros, n) for n in lengths]
    return Pairs(GRID[0], GRID[1], zeros, zeros, *counts)


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


table = pytest.mark.parametrize("case", CASES, ids=NAMES)


@table
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(jnp.float32, id="float32"),
        pytest.param(jnp.float64, id="float64", marks=pytest.mark.slow),
    ],
)
def test_huge_log_ratios(case, dtype):
    assert_finite(gradient(case.loss, *records(case, extreme(case), dtype), **case.needed))


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "orpo"], ids=lambda case: case.name)
def test_huge_log_ratios_have_the_values_of_the_paper(case):
    """Nothing is clamped; where the oracle's own exponentials overflow there is no comparison.

    `orpo` is left out, since it takes log-probabilities of at most 0.
    """
    p = extreme(case)
    result, slopes = gradient(case.loss, *records(case, p, jnp.float64), **case.needed)
    with np.errstate(all="ignore"):
        want = case.oracle(p, **case.needed)
    for got, expected in zip((result.loss, *slopes), want, strict=True):
        finite = np.isfinite(expected)
        assert finite.mean() > 0.4
        np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [c for c in CASES if c.divergence], ids=lambda case: case.name)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    "normalized",
    [
        pytest.param(False, id="sums"),
        pytest.param(True, id="averages", marks=pytest.mark.slow),
    ],
)
def test_huge_log_ratios_with_divergences(case, name, normalized):
    loss = losses.length_normalized(case.loss) if normalized else case.loss
    policy, reference = records(case, extreme(case), jnp.float32)
    assert_finite(gradient(loss, policy, reference, divergence=DIVERGENCES[name]))


@pytest.mark.parametrize("case", [c for c in CASES if not c.unpaired], ids=lambda case: case.name)
def test_empty_and_short_completions(case):
    """Lengths 0 and 1 in every combination; an empty completion has log-probability 0."""
    rows = itertools.product([0.0, 1.0], [0.0, 1.0], [-3.0, 0.0])
    chosen_length, rejected_length, log_prob = np.array(list(rows)).T
    chosen, rejected = chosen_length * log_prob, rejected_length * log_prob
    p = Pairs(*map(as_many, (chosen, rejected, chosen, rejected, chosen_length, rejected_length)))
    assert_finite(gradient(case.loss, *records(case, p, jnp.float32), **case.needed))


def test_gradient_does_not_vanish_where_an_exponential_is_worst():
    """A clamped exponent would stop the learning of the pair that needs it most."""
    zeros = jnp.asarray(as_many(0), jnp.float32)
    policy, reference = PairLogProbs(zeros - 1e3, zeros), PairLogProbs(zeros, zeros)
    for name, divergence in DIVERGENCES.items():
        _, slopes = gradient(losses.dpo, policy, reference, divergence=divergence)
        assert (slopes[0] < 0).all(), name


def corner(chosen, rejected=0.0):
    zeros = jnp.zeros(6)
    return PairLogProbs(zeros + chosen, zeros + rejected), PairLogProbs(zeros, zeros)


def test_subgradient_of_hinge_at_its_corner_is_0():
    _, slopes = gradient(losses.hinge, *corner(2.0), beta=0.5)
    np.testing.assert_array_equal(slopes, 0)
    _, slopes = gradient(losses.hinge, *corner(1.99), beta=0.5)
    np.testing.assert_array_equal(slopes, [[-0.5] * 6, [0.5] * 6])


def test_dpop_starts_as_dpo():
    """At policy = reference the penalty's corner; its subgradient there is 0."""
    at_reference = corner(0.0)
    _, ours = gradient(losses.dpop, *at_reference, penalty=50.0)
    _, plain = gradient(losses.dpo, *at_reference)
    np.testing.assert_array_equal(ours, plain)


def test_discopop_does_not_overflow_whatever_tau():
    for tau in (1e-3, 1.0, 3.0):
        policy, reference = records(CASES[0], extreme(CASES[0]), jnp.float32)
        assert_finite(gradient(losses.discopop, policy, reference, tau=tau))


def test_completions_of_probability_1_have_finite_odds():
    for dtype in (jnp.float32, jnp.float64):
        x = jnp.asarray([0.0, -1e-20, -1e-17, -1e-7, -1e-3, -1e4], dtype)
        ones = jnp.ones(6, jnp.int32)
        policy = PairLogProbs(x, x[::-1], ones, ones)
        assert_finite(gradient(losses.orpo, policy, None))
