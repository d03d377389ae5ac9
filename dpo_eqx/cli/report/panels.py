"""The panels of the report: each one as a drawing for the page, and all in one picture.

`curves.py` and `pairs.py` draw into the panels; `page.py` makes the page.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..._extras import require
from . import curves as curves, pairs as pairs
from .read import Record

WIDTH, HEIGHT = 4.3, 3.3  # size of a panel in inches of 96 pixels: as wide as a narrow window
STYLE = {
    "font.size": 10,
    "axes.edgecolor": curves.DARK,
    "axes.labelcolor": curves.DARK,
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.alpha": 0.25,
    "legend.fontsize": 8.5,
    "legend.columnspacing": 1.2,
    "text.color": curves.DARK,
    "xtick.color": curves.DARK,
    "ytick.color": curves.DARK,
    "svg.hashsalt": "dpo-eqx",
}


class Panel(NamedTuple):
    """A picture in the report: its title, its caption, and the function that draws it.

    It is left out if no run has one of `metrics`, unless there are none: then it is always there.
    """

    title: str
    words: str
    draw: Callable[[Any, Sequence[Record]], None]
    metrics: tuple[str, ...] = ()


CURVES = (
    Panel("Loss", "", curves.draw_loss),
    Panel(
        "Accuracy",
        "A tie counts one half. Before the first step the policy is its reference: all ties.",
        curves.draw_accuracy,
        ("rewards/accuracies",),
    ),
    Panel(
        "Margin",
        "Implicit reward of the chosen minus the rejected answer.",
        curves.draw_margin,
        ("rewards/margins",),
    ),
    Panel(
        "Rewards",
        "Relative to the reference. If both fall, both answers have become less likely; the loss "
        "depends on their difference alone.",
        curves.draw_rewards,
        ("rewards/chosen", "rewards/rejected"),
    ),
    Panel(
        "Log-probabilities",
        "Summed over the tokens of an answer: longer answers have lower values, so batches differ.",
        curves.draw_log_probs,
        ("logps/chosen", "logps/rejected"),
    ),
    Panel("Gradient norm", "Before clipping.", curves.draw_gradient),
)
# What only some runs have: rounds of `online`, supervised training, `--metrics`.
MORE_CURVES = (
    Panel(
        "Reward of samples",
        "What `--reward` gave the answers of a round: the mean of all, and of the best for each "
        "prompt.",
        curves.draw_sampled_reward,
        ("reward",),
    ),
    Panel(
        "KL to the reference",
        "Estimated from the answers of a round. It is the price of their reward.",
        curves.draw_kl,
        ("kl",),
    ),
    Panel(
        "Length of samples",
        "If it grows with the reward, the reward may pay for length.",
        curves.draw_length,
        ("length",),
    ),
    Panel(
        "Token accuracy",
        "The share of scored tokens that the policy holds for the most likely.",
        curves.draw_token_accuracy,
        ("mean_token_accuracy",),
    ),
    Panel(
        "Entropy",
        "How open the next token is. If it falls to 0, the policy has one answer left.",
        curves.draw_entropy,
        ("entropy",),
    ),
)
PAIRS = (
    Panel("Margins of the same pairs", "Right of 0 the policy agrees.", pairs.draw_histogram),
    Panel(
        "Calibration",
        "How often the answer that the policy prefers is the chosen one, against its certainty. "
        "Bars are 95% intervals, and larger points have more pairs. Below the dotted line the "
        "policy is overconfident.",
        pairs.draw_calibration,
    ),
    Panel(
        "Length and margin",
        "After training. A slope shows a preference for longer, or for shorter, answers.",
        pairs.draw_lengths,
    ),
)


def picture(records: Sequence[Record]) -> bytes:
    """All panels as one PNG."""
    panels = [*curve_panels(records), *pair_panels(records)]
    rows = -(-len(panels) // 3)
    with require("matplotlib", extra="train").rc_context(STYLE):
        figure = _figure(3 * WIDTH, rows * (HEIGHT + 0.3))
        figure.suptitle(", ".join(record.name for record in records))
        grid = figure.subfigures(rows, 3, squeeze=False).ravel()
        for part, panel in zip(grid, panels, strict=False):
            _draw(part, panel, records).set_title(panel.title, loc="left", fontweight="bold")
        return _saved(figure, "png")


def curve_panels(records: Sequence[Record]) -> Sequence[Panel]:
    """The panels of curves that some run has; before the first step, those of most runs."""
    there = {name for record in records for name in record.metrics}
    if not there:
        return CURVES
    panels = (*CURVES, *MORE_CURVES)
    return [panel for panel in panels if not panel.metrics or there & {*panel.metrics}]


def pair_panels(records: Sequence[Record]) -> Sequence[Panel]:
    """The panels about pairs, or none if the run has no margins after training."""
    return PAIRS if any(pairs.has_pairs(record.after) for record in records) else ()


def cards(panels: Sequence[Panel], records: Sequence[Record]) -> str:
    """The panels as HTML, each with title, drawing and caption."""
    with require("matplotlib", extra="train").rc_context(STYLE):
        return f'<div class="cards">{"".join(_card(panel, records) for panel in panels)}</div>'


def _card(panel: Panel, records: Sequence[Record]) -> str:
    figure = _figure(WIDTH, HEIGHT)
    _draw(figure, panel, records)
    drawing = _saved(figure, "svg").decode()
    # Only the element itself, with ids of this panel's own: ids must be unique in the page.
    drawing = drawing[drawing.index("<svg") :]
    prefix = re.sub(r"\W+", "-", panel.title.lower())
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", drawing)
    drawing = drawing.replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(panel.title)}" ', 1
    )
    return f"<figure><h3>{panel.title}</h3>{drawing}<figcaption>{panel.words}</figcaption></figure>"


def _draw(figure: Any, panel: Panel, records: Sequence[Record]) -> Any:
    """The axes of the panel, with the legend below them, so that it hides nothing."""
    axes = figure.subplots()
    panel.draw(axes, records)
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if sum(map(len, labels)) < 48 else 2 if max(map(len, labels)) < 27 else 1
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return axes


def _figure(width: float, height: float) -> Any:
    module = require("matplotlib.figure", extra="train")
    return module.Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any, kind: str) -> bytes:
    file = io.BytesIO()
    # Without the date, so that the same run gives the same file.
    figure.savefig(file, format=kind, dpi=100, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()
