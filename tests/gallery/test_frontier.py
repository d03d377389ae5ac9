"""DPO lies on the exact frontier of reward against KL; a loss without its theory lies below."""

import frontier
import numpy as np
import pytest
from shared import intervals

from .as_users import computed


@pytest.fixture(scope="module")
def quick():
    return computed(frontier, frontier.QUICK)


def test_dpo_is_near_the_frontier_and_nothing_is_above_it(quick):
    assert quick.share["dpo"].min() > 0.9
    assert max(share.max() for share in quick.share.values()) < 1


def test_a_smaller_beta_goes_further(quick):
    assert (np.diff(quick.kl["dpo"], axis=1) > 0).all()
    assert (np.diff(quick.reward["dpo"], axis=1) > 0).all()


@pytest.mark.slow
def test_dpo_is_within_five_percent_with_enough_pairs():
    pairs = (256, 16384)
    size = frontier.FULL._replace(names=("kto", "sft"), dpo_pairs=pairs)
    results = computed(frontier, size)
    bounds = {name: intervals.interval(share) for name, share in results.share.items()}
    mean, half = bounds["16384 pairs"]
    assert (mean - half > 0.95).all()
    for name in ("256 pairs", "kto", "sft"):
        mean, half = bounds[name]
        assert (mean + half < 0.95).all()
    assert "| kto" in frontier.table(results)
