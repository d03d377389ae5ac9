"""IPO holds on to the reference if labels are certain, and DPO does not."""

import determinism
import numpy as np
import pytest
from shared import intervals

from .as_users import computed

CERTAIN, BETAS = 1, np.array(determinism.BETAS)
DPO, IPO = range(2)


@pytest.fixture(scope="module")
def quick():
    return computed(determinism, determinism.QUICK)


def test_dpo_ignores_beta_if_labels_are_certain(quick):
    at_end = quick.kl[:, :, CERTAIN, :, -1]
    assert (at_end[:, DPO, BETAS <= 0.5] > 0.95).all()
    assert (at_end[:, IPO, BETAS >= 0.5] < 0.3).all()
    np.testing.assert_allclose(quick.limit[:, DPO, CERTAIN], 1, rtol=1e-6)


def test_both_reach_their_limits_if_labels_are_not_certain(quick):
    np.testing.assert_allclose(quick.kl[..., -1][:, :, 0], quick.limit[:, :, 0], atol=1e-3)


def test_ipo_reaches_its_limit_if_labels_are_certain(quick):
    found, limit = quick.kl[:, IPO, CERTAIN, :, -1], quick.limit[:, IPO, CERTAIN]
    np.testing.assert_allclose(found, limit, atol=1e-3)


@pytest.mark.slow
def test_the_claim_holds_with_its_intervals():
    results = computed(determinism, determinism.FULL)
    mean, half = intervals.interval(results.kl[:, :, CERTAIN, :, -1])
    assert (mean[DPO] - half[DPO] > 0.8).all()
    assert (mean[DPO, BETAS <= 1] > 0.99).all()
    assert (mean[IPO, BETAS >= 0.5] + half[IPO, BETAS >= 0.5] < 0.2).all()
    np.testing.assert_allclose(results.kl[:, IPO, :, :, -1], results.limit[:, IPO], atol=1e-3)
    assert "certain: ipo, exact" in determinism.table(results)
