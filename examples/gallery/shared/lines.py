"""Lines with intervals, in colours that colour-blind readers can tell apart (Okabe and Ito)."""

import itertools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from .intervals import interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def draw(
    axes: Axes,
    x: Mapping[str, Float[np.ndarray, "seeds points"]],
    y: Mapping[str, Float[np.ndarray, "seeds points"]],
) -> None:
    """A line for each name: means over seeds in both directions, and the interval of `y`."""
    styles = zip(x, itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    for name, colour, marker in styles:
        middle, (mean, half) = x[name].mean(axis=0), interval(y[name])
        axes.plot(middle, mean, color=colour, marker=marker, markersize=4, label=name)
        axes.fill_between(middle, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
