"""Curves over the steps of one run or several: few enough points for any run, drawn honestly.

What is drawn about pairs is in `report_pairs.py`, the page around it in `report_page.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ..extras import require
from .report_read import Columns, Record

# Of Okabe and Ito: told apart by the colour-blind too.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
DARK = "#222222"
# More steps than this are drawn as means of neighbours in a band from least to greatest.
MOST_POINTS, BUCKETS = 120, 60
LOG_2 = float(np.log(2))


class Series(NamedTuple):
    """A metric in a panel: its name in the files, what it is called, and how it is told apart."""

    metric: str
    label: str
    colour: str = BLUE
    style: str = "-"


class Envelope(NamedTuple):
    """A curve in few points: where they are, and of the steps around each the least, mean, most."""

    step: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]


def envelope(
    step: Float[np.ndarray, " lines"], value: Float[np.ndarray, " lines"], buckets: int = BUCKETS
) -> Envelope:
    """The steps in `buckets` groups of neighbours; what is not finite is left out."""
    there = np.isfinite(value)
    step, value = step[there], value[there]
    starts = np.unique(
        np.linspace(0, len(step), min(buckets, len(step)), endpoint=False, dtype=int)
    )
    if not len(starts):
        return Envelope(step, value, value, value)
    sizes = np.diff(np.append(starts, len(step)))
    return Envelope(
        np.add.reduceat(step, starts) / sizes,
        np.minimum.reduceat(value, starts),
        np.add.reduceat(value, starts) / sizes,
        np.maximum.reduceat(value, starts),
    )


def draw_loss(axes: Any, records: Sequence[Record]) -> None:
    """The loss, and where it begins for most losses of pairs."""
    _curves(axes, records, [Series("loss", "training")])
    losses = [record.metrics["loss"][0] for record in records if "loss" in record.metrics]
    if any(abs(loss - LOG_2) < 1e-3 for loss in losses):
        _line(axes, LOG_2, "log 2: no preference")
    axes.set_ylabel("loss (nats per pair)")


def draw_accuracy(axes: Any, records: Sequence[Record]) -> None:
    """How many pairs are ranked right."""
    _curves(axes, records, [Series("rewards/accuracies", "training")])
    _line(axes, 0.5, "chance")
    axes.set_ylabel("pairs ranked right (share)")
    axes.set_ylim(-0.03, 1.03)


def draw_margin(axes: Any, records: Sequence[Record]) -> None:
    """The chosen's reward less the rejected's."""
    _curves(axes, records, [Series("rewards/margins", "training")])
    _line(axes, 0, "no preference")
    axes.set_ylabel("reward margin (nats)")


def draw_rewards(axes: Any, records: Sequence[Record]) -> None:
    """Both rewards: where both fall, both answers have become less likely than at the start."""
    _curves(axes, records, _both("rewards"))
    _line(axes, 0, "as the reference")
    axes.set_ylabel("implicit reward (nats)")


def draw_log_probs(axes: Any, records: Sequence[Record]) -> None:
    """Both log-probabilities, which may well fall together."""
    _curves(axes, records, _both("logps"))
    axes.set_ylabel("log-probability (nats per answer)")


def draw_gradient(axes: Any, records: Sequence[Record]) -> None:
    """The norm of the gradient before it is clipped."""
    _curves(axes, records, [Series("grad_norm", "training")])
    axes.set_ylabel("gradient norm")
    norms = [record.metrics.get("grad_norm", np.ones(1)) for record in records]
    norms = np.concatenate(norms)
    norms = norms[norms > 0]
    if norms.size and norms.max() > 100 * np.median(norms):
        axes.set_yscale("log")


def _both(kind: str) -> list[Series]:
    return [
        Series(f"{kind}/chosen", "chosen", BLUE, "-"),
        Series(f"{kind}/rejected", "rejected", VERMILION, "--"),
    ]


def _curves(axes: Any, records: Sequence[Record], series: Sequence[Series]) -> None:
    """Every series of every run; of several runs the colour says which it is."""
    axes.set_xlabel("step")
    for number, record in enumerate(records):
        for each in series:
            if len(records) > 1:
                label = record.name if len(series) == 1 else f"{record.name}, {each.label}"
                each = each._replace(colour=COLOURS[number % len(COLOURS)], label=label)
            _training(axes, record.metrics, each)
            _held_out(axes, record.evaluations, each, alone=len(records) == len(series) == 1)
    _whole_steps(axes, max(len(record.metrics.get("step", ())) for record in records))


def _whole_steps(axes: Any, count: int) -> None:
    """Ticks at whole steps, short where they are many, and room beside a single step."""
    ticker = require("matplotlib.ticker", extra="train")
    axes.xaxis.set_major_locator(
        ticker.MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    axes.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda x, _: f"{x:g}" if x < 10_000 else f"{x / 1000:g}k")
    )
    axes.margins(x=0.03)
    if count == 1:
        axes.set_xlim(0, 2)


def _training(axes: Any, columns: Columns, series: Series) -> None:
    if series.metric not in columns:
        return
    step, value = columns["step"], columns[series.metric]
    style = {"color": series.colour, "linestyle": series.style, "label": series.label}
    if len(step) <= MOST_POINTS:
        # Where both are the same, as at the first step, the open square shows around the point.
        square = (
            {"marker": "s", "markersize": 6, "markerfacecolor": "none"}
            if series.style == "--"
            else {}
        )
        points = {"marker": "o", "markersize": 3.5} | square if len(step) <= 30 else {}
        axes.plot(step, value, linewidth=1.4, **points, **style)
        return
    curve = envelope(step, value)
    axes.fill_between(curve.step, curve.low, curve.high, color=series.colour, alpha=0.18, lw=0)
    axes.plot(curve.step, curve.mean, linewidth=1.6, **style)


def _held_out(axes: Any, columns: Columns, series: Series, *, alone: bool) -> None:
    """The evaluations as points, which are of the same pairs each time."""
    name = f"eval/{series.metric}"
    if name not in columns:
        return
    value = envelope(columns["step"], columns[name])
    # Among several curves the open circles have the colour of theirs.
    colour = VERMILION if alone else series.colour
    axes.plot(
        value.step,
        value.mean,
        "o:",
        color=colour,
        markerfacecolor="white",
        markersize=5,
        linewidth=1,
        label="held out" if alone else None,
    )


def _line(axes: Any, height: float | int, label: str) -> None:
    axes.axhline(height, color=DARK, linestyle=":", linewidth=1, label=label)
