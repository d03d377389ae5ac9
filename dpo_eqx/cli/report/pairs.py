"""The effect of a run on some pairs: margins before and after, calibration, length.

`probe.py` computes the numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..._diagnosis.preferences import calibrate
from .curves import BLUE, COLOURS, DARK, ORANGE
from .read import Record


def draw_histogram(axes: Any, records: Sequence[Record]) -> None:
    """Margins before and after; for several runs, margins after, as shares of each run's pairs."""
    shares = len(records) > 1
    axes.set(xlabel="reward margin", ylabel="share of pairs" if shares else "pairs")
    sets = _margins(records)
    spread_out = [values for _, values, _ in sets if np.ptp(values) > 1e-3]
    edges = np.histogram_bin_edges(np.concatenate([np.zeros(1), *spread_out]), bins=24)
    for label, values, colour in sets:
        if np.ptp(values) > 1e-3:
            style = {"color": colour, "weights": np.full(values.size, 1 / values.size)}
            style = style if shares else {"color": colour}
            axes.hist(values, edges, histtype="stepfilled", alpha=0.3, **style)
            axes.hist(values, edges, histtype="step", linewidth=1.5, label=label, **style)
        else:
            # The policy is its reference: a single bar would dwarf all other bars.
            label = f"{label}: all {values[0]:.2g}"
            axes.axvline(values[0], color=colour, linewidth=2.5, label=label)
    axes.axvline(0, color=DARK, linestyle=":", linewidth=1)
    axes.yaxis.get_major_locator().set_params(integer=not shares)


def draw_calibration(axes: Any, records: Sequence[Record]) -> None:
    """How often the side that the policy prefers is the chosen one, by how sure it is."""
    axes.plot([0.5, 1], [0.5, 1], ":", color=DARK, linewidth=1, label="calibrated")
    for label, values, colour in _margins(records):
        if np.ptp(values) > 1e-3:
            _calibration_of(axes, values, label, colour)
    axes.set(xlabel="predicted: sigmoid of |margin|", ylabel="came true (share of pairs)")
    axes.set(xlim=(0.49, 1.01), ylim=(-0.03, 1.03))


def draw_lengths(axes: Any, records: Sequence[Record]) -> None:
    """Margins after the run against how much longer the chosen answer is."""
    axes.set(xlabel="chosen longer by (tokens)", ylabel="reward margin")
    for number, record in enumerate(records):
        if not has_pairs(record.after):
            continue
        after = record.after or {}
        longer = np.subtract(_column(after, "chosen_tokens"), _column(after, "rejected_tokens"))
        margin = _column(after, "margin")
        name = f"{record.name}: " if len(records) > 1 else ""
        label = f"{name}correlation {correlation(longer, margin)}"
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(longer, margin, "o", color=colour, markersize=3.5, alpha=0.5, label=label)
    axes.axhline(0, color=DARK, linestyle=":", linewidth=1)
    axes.axvline(0, color=DARK, linestyle=":", linewidth=1)


def correlation(one: np.ndarray, other: np.ndarray) -> str:
    """Pearson's correlation in two digits; a dash if one of the two does not vary."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return "\N{EN DASH}"
    return f"{np.corrcoef(one, other)[0, 1]:+.2f}"


def has_pairs(found: Mapping[str, Any] | None) -> bool:
    """Whether there are margins."""
    return bool(found and found.get("margin"))


def _margins(records: Sequence[Record]) -> list[tuple[str, np.ndarray, str]]:
    """Margins with label and colour: before and after for one run, only after for several."""
    if len(records) == 1:
        both = (("before", records[0].before, ORANGE), ("after", records[0].after, BLUE))
    else:
        both = [(r.name, r.after, COLOURS[i % len(COLOURS)]) for i, r in enumerate(records)]
    found = [(label, _column(x, "margin"), c) for label, x, c in both if x and has_pairs(x)]
    finite = [(label, values[np.isfinite(values)], colour) for label, values, colour in found]
    return [entry for entry in finite if entry[1].size]


def _column(found: Mapping[str, Any], name: str) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in found[name]], float)


def _calibration_of(axes: Any, margins: np.ndarray, label: str, colour: str) -> None:
    """A point for each bin that has pairs, sized by their number, with its 95% interval."""
    bins = calibrate(margins.astype(np.float32))
    count = np.asarray(bins.count)
    predicted, frequency = (np.asarray(x)[count > 0] for x in bins.mean())
    count = count[count > 0]
    low, high = wilson(frequency, count)
    axes.errorbar(
        predicted,
        frequency,
        yerr=[frequency - low, high - frequency],
        color=colour,
        linewidth=1.2,
        elinewidth=1,
        label=label,
    )
    axes.scatter(predicted, frequency, s=10 + 90 * count / count.max(), color=colour, alpha=0.6)


def wilson(share: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval around shares of `count` independent trials; `z` of 1.96 gives 95%."""
    # Unlike the normal interval, it does not collapse to a point at shares of 0 and 1.
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    inner = share * (1 - share) / count + (z / (2 * count)) ** 2
    half = z * np.sqrt(inner) / (1 + z**2 / count)
    return np.minimum(middle - half, share), np.maximum(middle + half, share)
