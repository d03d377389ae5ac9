"""A reader who likes long answers teaches DPO length, and R-DPO does not learn it."""

import length
import numpy as np
import pytest
from shared import intervals

from .as_users import computed


def beyond_fair(results, name):
    """The tokens beyond those of a reader without bias, at equal KL, for each seed."""
    fair = results["dpo, a reader without bias"]
    return length.at(results[name], results[name].length) - length.at(fair, fair.length)


def test_dpo_learns_length_and_r_dpo_does_not():
    results = computed(length, length.QUICK)
    learned, regularised = (beyond_fair(results, name) for name in ("dpo", "r_dpo"))
    assert (learned > 0.1).all()
    assert (np.abs(regularised) < learned / 2).all()


@pytest.mark.slow
def test_the_claim_holds_with_its_intervals():
    results = computed(length, length.FULL)
    mean, half = intervals.interval(beyond_fair(results, "dpo"))
    assert mean - half > 0.2
    mean, half = intervals.interval(beyond_fair(results, "r_dpo"))
    assert abs(mean) + half < 0.2
    assert "simpo" in length.table(results)
