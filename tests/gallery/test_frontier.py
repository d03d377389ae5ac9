"""DPO lies on the exact frontier of reward against KL; a loss without its theory lies below."""

import frontier
import jax
import numpy as np
import pytest
from shared import intervals


@pytest.fixture(scope="module")
def users_settings():
    """JAX as users have it: in float64 the same keys would draw another task."""
    promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with jax.enable_x64(False), promotion[0], promotion[1]:
        yield


@pytest.fixture(scope="module")
def quick(users_settings):
    return frontier.compute(frontier.QUICK)


def test_dpo_is_near_the_frontier_and_nothing_is_above_it(quick):
    assert quick.share["dpo"].min() > 0.9
    assert max(share.max() for share in quick.share.values()) < 1


def test_a_smaller_beta_goes_further(quick):
    assert (np.diff(quick.kl["dpo"], axis=1) > 0).all()
    assert (np.diff(quick.reward["dpo"], axis=1) > 0).all()


@pytest.mark.slow
@pytest.mark.usefixtures("users_settings")
def test_dpo_is_within_five_percent_with_enough_pairs():
    pairs = (256, 16384)
    size = frontier.FULL._replace(names=("kto", "sft"), dpo_pairs=pairs)
    results = frontier.compute(size)
    bounds = {name: intervals.interval(share) for name, share in results.share.items()}
    mean, half = bounds["16384 pairs"]
    assert (mean - half > 0.95).all()
    for name in ("256 pairs", "kto", "sft"):
        mean, half = bounds[name]
        assert (mean + half < 0.95).all()
    assert "| kto" in frontier.table(results)
