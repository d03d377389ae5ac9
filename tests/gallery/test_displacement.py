"""Likelihood displacement: what the entry claims, on few seeds in the default suite."""

import displacement
import numpy as np
import pytest
from shared.intervals import interval

from .as_users import computed


@pytest.fixture(scope="module")
def quick():
    return computed(displacement, displacement.QUICK)


def ends(results):
    """The mean change of both log-probabilities of each run at its end."""
    last = (x[..., -1].mean(axis=0) for x in (results.chosen, results.rejected))
    return {name: pair for name, *pair in zip(displacement.RUNS, *last, strict=True)}


def test_both_log_probabilities_fall_and_the_cures_keep_the_chosen_one(quick):
    chosen, rejected = ends(quick)["DPO"]
    assert rejected < chosen < -0.5
    assert ends(quick)["DPOP"][0] > -0.1
    assert ends(quick)["DPO + SFT"][0] > -0.3


def test_ches_predicts_displacement(quick):
    assert quick.predicts[:, 0].mean() < -0.3
    assert quick.quarters[:, 0].mean() > quick.quarters[:, 3].mean() + 0.5
    assert ends(quick)["DPO, high CHES"][0] < ends(quick)["DPO, low CHES"][0] - 0.5


def test_the_table_and_the_picture_hold_every_run(quick):
    text = displacement.table(quick)
    assert all(f"| {name} " in text for name in displacement.RUNS)
    assert len(displacement.picture(quick).axes) == 2


@pytest.mark.slow
def test_the_claims_hold_with_their_intervals():
    results = computed(displacement, displacement.FULL)
    low, high = (x[..., -1] for x in (results.chosen[:, 2], results.chosen[:, 1]))
    for negative in (results.chosen[:, 0, -1], results.predicts[:, 0], high - low):
        mean, half = interval(negative)
        assert mean + half < 0
    for kept in (results.chosen[:, 3, -1], results.chosen[:, 4, -1]):
        mean, half = interval(kept)
        assert mean - half > -0.3
    mean, half = interval(results.predicts.sum(axis=1))
    assert mean + half < 0, "CHES predicts better than the number of tokens that differ"
    assert np.isfinite(results.rejected).all()
