"""The entry on coverage: who writes the pairs matters if the reference covers the optimum badly."""

import data_coverage
import numpy as np
import pytest
from shared import intervals

from .as_users import computed

REFERENCE, UNIFORM, POLICY = range(3)


@pytest.fixture(scope="module")
def quick():
    # Optax's schedules mix integers and floats.
    return computed(data_coverage, data_coverage.QUICK)


def test_the_policy_is_the_better_writer_if_the_reference_covers_badly(quick):
    seldom = quick.gap[:, 1, :, -1]
    assert (seldom[:, POLICY] < 0.8 * seldom[:, REFERENCE]).all()
    assert (quick.gap > -1e-9).all()
    often, seldom = np.swapaxes(quick.coverage[:, :, REFERENCE], 0, 1)
    assert (seldom > 10 * often).all()
    assert "uniform" in data_coverage.table(quick)
    assert len(data_coverage.picture(quick).axes) == 2


@pytest.mark.slow
def test_the_claims():
    results = computed(data_coverage, data_coverage.FULL)
    often, seldom = np.moveaxis(results.gap[..., -1], 1, 0)
    mean, half = intervals.interval(seldom[:, REFERENCE] - seldom[:, POLICY])
    assert mean - half > 0
    assert often[:, REFERENCE].mean() < 0.1
    assert often[:, POLICY].mean() < 0.1
