"""Curves over the steps of one run or several, in few points and without hiding an outlier.

`pairs.py` draws pairs, and `page.py` makes the page.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ..._extras import require
from ..settings.goal import prefix
from .read import Columns, Record, held_out_sets

# The palette of Okabe and Ito, which colour-blind readers can tell apart, too.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
DARK = "#222222"
# The points of the evaluations on each held-out set.
MARKERS = "osD^v"
# More steps than this are drawn as means of neighbouring steps, in a band from least to greatest.
MOST_POINTS, BUCKETS = 120, 60
LOG_2 = float(np.log(2))


class Series(NamedTuple):
    """A metric in a panel: its name in the files, its label, its colour and its line style."""

    metric: str
    label: str
    colour: str = BLUE
    style: str = "-"


class Envelope(NamedTuple):
    """A curve in few points: for each the mean step, and the least, mean and greatest value."""

    step: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"]
    mean: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]


def envelope(
    step: Float[np.ndarray, " lines"], value: Float[np.ndarray, " lines"], buckets: int = BUCKETS
) -> Envelope:
    """The steps in `buckets` groups of neighbours. Values that are not finite are left out."""
    is_finite = np.isfinite(value)
    step, value = step[is_finite], value[is_finite]
    starts = np.unique(
        np.linspace(0, len(step), min(buckets, len(step)), endpoint=False, dtype=int)
    )
    if not len(starts):
        return Envelope(step, value, value, value)
    sizes = np.diff(np.append(starts, len(step)))
    # The mean, not a sample of the steps: the band shows the outliers that a mean hides.
    return Envelope(
        np.add.reduceat(step, starts) / sizes,
        np.minimum.reduceat(value, starts),
        np.add.reduceat(value, starts) / sizes,
        np.maximum.reduceat(value, starts),
    )


def draw_loss(axes: Any, records: Sequence[Record]) -> None:
    """The loss, with a line at log 2, where most losses of pairs begin."""
    _curves(axes, records, [Series("loss", "training")])
    losses = [record.metrics["loss"][0] for record in records if "loss" in record.metrics]
    if any(abs(loss - LOG_2) < 1e-3 for loss in losses):
        _line(axes, LOG_2, "log 2: no preference")
    axes.set_ylabel("loss (nats per pair)")


def draw_accuracy(axes: Any, records: Sequence[Record]) -> None:
    """The share of pairs whose chosen answer has the higher reward."""
    _curves(axes, records, [Series("rewards/accuracies", "training")])
    _line(axes, 0.5, "chance")
    axes.set_ylabel("pairs ranked right (share)")
    axes.set_ylim(-0.03, 1.03)


def draw_margin(axes: Any, records: Sequence[Record]) -> None:
    """The chosen answer's reward minus the rejected answer's."""
    _curves(axes, records, [Series("rewards/margins", "training")])
    _line(axes, 0, "no preference")
    axes.set_ylabel("reward margin")


def draw_rewards(axes: Any, records: Sequence[Record]) -> None:
    """Both rewards: if both fall, both answers have become less likely than at the start."""
    _curves(axes, records, _both("rewards"))
    _line(axes, 0, "as the reference")
    axes.set_ylabel("implicit reward")


def draw_log_probs(axes: Any, records: Sequence[Record]) -> None:
    """Both log-probabilities, which can fall together."""
    _curves(axes, records, _both("logps"))
    axes.set_ylabel("log-probability (nats per answer)")


def draw_gradient(axes: Any, records: Sequence[Record]) -> None:
    """The norm of the gradient before it is clipped."""
    _curves(axes, records, [Series("grad_norm", "training")])
    axes.set_ylabel("gradient norm")
    norms = [record.metrics.get("grad_norm", np.ones(1)) for record in records]
    norms = np.concatenate(norms)
    # A logarithmic axis has no place for 0, and only spikes need one.
    norms = norms[norms > 0]
    if norms.size and norms.max() > 100 * np.median(norms):
        axes.set_yscale("log")


def draw_sampled_reward(axes: Any, records: Sequence[Record]) -> None:
    """The reward of the answers of each round."""
    series = [
        Series("reward", "all answers", BLUE, "-"),
        Series("reward_best", "best of each prompt", GREEN, "--"),
    ]
    _curves(axes, records, series)
    axes.set_ylabel("reward")


def draw_kl(axes: Any, records: Sequence[Record]) -> None:
    """The KL divergence of the policy to its reference, from the answers of each round."""
    _curves(axes, records, [Series("kl", "training")])
    _line(axes, 0, "as the reference")
    axes.set_ylabel("KL (nats per answer)")


def draw_length(axes: Any, records: Sequence[Record]) -> None:
    """The length of the answers of each round."""
    _curves(axes, records, [Series("length", "training")])
    axes.set_ylabel("tokens per answer")


def draw_token_accuracy(axes: Any, records: Sequence[Record]) -> None:
    """The share of tokens that are the most likely one."""
    _curves(axes, records, [Series("mean_token_accuracy", "training")])
    axes.set_ylabel("tokens guessed right (share)")


def draw_entropy(axes: Any, records: Sequence[Record]) -> None:
    """The mean entropy of the next token."""
    _curves(axes, records, [Series("entropy", "training")])
    axes.set_ylabel("entropy (nats per token)")


def _both(kind: str) -> list[Series]:
    return [
        Series(f"{kind}/chosen", "chosen", BLUE, "-"),
        Series(f"{kind}/rejected", "rejected", VERMILION, "--"),
    ]


def _curves(axes: Any, records: Sequence[Record], series: Sequence[Series]) -> None:
    """Every series of every run; the colour identifies the run if there are several."""
    axes.set_xlabel("step")
    for number, record in enumerate(records):
        for curve in series:
            if len(records) > 1:
                label = record.name if len(series) == 1 else f"{record.name}, {curve.label}"
                curve = curve._replace(colour=COLOURS[number % len(COLOURS)], label=label)
            _training(axes, record.metrics, curve)
            _held_out(axes, record.evaluations, curve, alone=len(records) == len(series) == 1)
    _whole_steps(axes, max(len(record.metrics.get("step", ())) for record in records))


def _whole_steps(axes: Any, count: int) -> None:
    """Ticks at whole steps, with short labels for large numbers, and room around a single step."""
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
    # A step may lack a metric: a batch without rejected completions has no reward of them.
    is_there = np.isfinite(columns[series.metric])
    step, value = columns["step"][is_there], columns[series.metric][is_there]
    style = {"color": series.colour, "linestyle": series.style, "label": series.label}
    if len(step) <= MOST_POINTS:
        # If both values are the same, as at the first step, the open square shows around the point.
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
    """The evaluations as points, of one kind for each held-out set."""
    sets = held_out_sets(columns)
    for number, held_out in enumerate(sets):
        name = prefix(held_out) + series.metric
        if name not in columns:
            continue
        value = envelope(columns["step"], columns[name])
        # Among several curves the open points have the colour of their curve.
        colour = COLOURS[(number + 1) % len(COLOURS)] if alone else series.colour
        axes.plot(
            value.step,
            value.mean,
            f"{MARKERS[number % len(MARKERS)]}:",
            color=colour,
            markerfacecolor="white",
            markersize=5,
            linewidth=1,
            label=f"held out {held_out}".rstrip() if alone else None,
        )


def _line(axes: Any, height: float | int, label: str) -> None:
    axes.axhline(height, color=DARK, linestyle=":", linewidth=1, label=label)
