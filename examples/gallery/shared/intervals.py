"""Means over seeds with intervals, as numbers and as text."""

import numpy as np
from jaxtyping import Float
from scipy import stats


def interval(values: Float[np.ndarray, "seeds *rest"]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the first axis, and the half width of its 95% interval (Student's t)."""
    seeds = len(values)
    if seeds < 2:
        raise ValueError(f"`values` must have at least 2 seeds on its first axis; got {seeds}.")
    error = values.std(axis=0, ddof=1) / seeds**0.5
    return values.mean(axis=0), stats.t.ppf(0.975, seeds - 1) * error


def as_text(values: Float[np.ndarray, " seeds"], digits: int = 2) -> str:
    """The mean and its 95% interval, such as `0.53 ± 0.04`."""
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
