"""MODPO lies on the exact Pareto front, and the weighted losses lie below it."""

import numpy as np
import pytest
import two_rewards
from shared import intervals

from .as_users import computed

MODPO, LOSS_WEIGHTING = two_rewards.METHODS


@pytest.fixture(scope="module")
def quick():
    return computed(two_rewards, two_rewards.QUICK)


def test_modpo_gets_nearly_all_of_the_gain_for_every_weight(quick):
    assert quick.share[MODPO].min() > 0.9
    assert max(share.max() for share in quick.share.values()) < 1


def test_the_weights_trade_one_reward_for_the_other(quick):
    first, second = np.moveaxis(quick.rewards[MODPO], -1, 0)
    assert (np.diff(first, axis=1) > 0).all()
    assert (np.diff(second, axis=1) < 0).all()


@pytest.mark.slow
def test_the_claim_holds_with_its_intervals():
    results = computed(two_rewards, two_rewards.FULL)
    mean, half = intervals.interval(results.share[MODPO])
    assert (mean - half > 0.9).all()
    conflict = slice(1, 3)  # weights 0.3 and 0.5, where neither reward dominates
    more = results.share[MODPO] - results.share[LOSS_WEIGHTING]
    mean, half = intervals.interval(more[:, conflict])
    assert (mean - half > 0).all()
    assert "reward 2" in two_rewards.table(results)
