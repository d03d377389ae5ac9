"""Losses end at the optima that their theories name, and these optima differ."""

import known_optimum
import numpy as np
import pytest
from shared import optima

from .as_users import computed


@pytest.fixture(scope="module")
def quick():
    return computed(known_optimum, known_optimum.QUICK)


def test_each_loss_ends_at_its_own_optimum(quick):
    for name, optimum in quick.optimum.items():
        assert optima.distance(quick.trained[name], optimum).max() < 1e-4, name
    assert optima.distance(quick.optimum["ipo"], quick.optimum["dpo"]).min() > 0.1


def test_the_optimum_by_bisection_is_the_one_in_closed_form(quick):
    by_bisection = optima.by_divergence(lambda rho: rho)
    bandit = optima.Bandit(*(np.asarray(x[0], np.float64) for x in quick.bandits))
    got = by_bisection(bandit, known_optimum.BETA)
    np.testing.assert_allclose(got, optima.boltzmann(bandit, known_optimum.BETA), atol=1e-9)


@pytest.mark.slow
def test_all_of_them():
    results = computed(known_optimum, known_optimum.FULL)
    assert set(results.optimum) == set(known_optimum.CASES)
    for name, optimum in results.optimum.items():
        assert optima.distance(results.trained[name], optimum).max() < 1e-4, name
        assert np.abs(np.exp(optimum).sum(axis=-1) - 1).max() < 1e-5
    assert "rho = logit(w)" in known_optimum.table(results)
