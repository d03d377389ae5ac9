"""KTO with few desirable labels: what the entry claims, on few seeds in the default suite."""

import numpy as np
import pytest
import unbalanced_thumbs
from shared.intervals import interval

from .as_users import computed


@pytest.fixture(scope="module")
def quick():
    return computed(unbalanced_thumbs, unbalanced_thumbs.QUICK)


KTO, RULE, DPO, REFERENCE = range(4)


def test_kto_learns_from_one_desirable_label_in_a_hundred(quick):
    gained = quick.reward[:, :3] - quick.reward[:, [REFERENCE]]
    few, half = gained[:, KTO, 0].mean(), gained[:, KTO, -1].mean()
    assert few > 0.5 * half > 0.2


def test_the_rule_costs_reward_and_keeps_the_policy_closer_to_the_reference(quick):
    assert (quick.reward[:, RULE, :2] - quick.reward[:, KTO, :2]).mean() < -0.05
    assert (quick.kl[:, RULE, :2] < quick.kl[:, KTO, :2]).mean() > 0.8
    np.testing.assert_allclose(quick.kl[:, REFERENCE], 0, atol=1e-12)


def test_the_table_and_the_picture_hold_every_run(quick):
    text = unbalanced_thumbs.table(quick)
    assert all(name in text for name in unbalanced_thumbs.RUNS)
    assert len(unbalanced_thumbs.picture(quick).axes) == 2


@pytest.mark.slow
def test_the_claim_holds_with_its_interval():
    results = computed(unbalanced_thumbs, unbalanced_thumbs.FULL)
    mean, half = interval(results.reward[:, KTO, 0] - results.reward[:, REFERENCE, 0])
    assert mean - half > 0
    mean, half = interval(results.reward[:, RULE, 0] - results.reward[:, KTO, 0])
    assert mean + half < 0
