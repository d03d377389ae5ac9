"""The output of a run: progress while it works, and at the end a table and a picture.

Numbers come in as plain lists; this file uses no models and no data.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

Tell = Callable[[int, str], None]
Numbers = Sequence[float]
Columns = Mapping[str, Numbers]

HAS_RICH = importlib.util.find_spec("rich") is not None
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
TRAINING, HELD_OUT = "tab:gray", "tab:blue"
RUNS = ("tab:orange", "tab:blue", "tab:green", "tab:red")


@contextlib.contextmanager
def progress(title: str, steps: int) -> Iterator[Tell]:
    """A function `tell(step, text)`: a bar on a terminal, elsewhere about ten lines in all."""
    if HAS_RICH and sys.stdout.isatty():
        with _bar(title, steps) as tell:
            yield tell
        return

    def tell(step: int, text: str, /) -> None:
        if step in (1, steps) or step % max(1, steps // 8) == 0:
            say(f"{title} {step:{len(str(steps))}}/{steps}  {text}")

    yield tell


@contextlib.contextmanager
def _bar(title: str, steps: int) -> Iterator[Tell]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.fields[text]}")
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text)
    with Progress(*columns) as bars:
        task = bars.add_task(title, total=steps, text="")
        yield lambda step, text: bars.update(task, completed=step, text=text)


def say(text: str) -> None:
    """Prints a line at once, since a pipe would otherwise buffer it."""
    print(text, flush=True)


def say_what_is_missing() -> None:
    """Names packages that are not installed, what the run omits without them, and the remedy."""
    features = {"bars and colours (rich)": HAS_RICH, "the picture (matplotlib)": HAS_MATPLOTLIB}
    missing = [name for name, is_installed in features.items() if not is_installed]
    if missing:
        say(f'Left out: {", ".join(missing)}. For all of it: pip install ".[examples]"')


def summary(metrics: Mapping[str, float]) -> str:
    """The metrics of a step that its line shows."""
    names = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    return "  ".join(f"{names[key]} {metrics[key]:.3f}" for key in names if key in metrics)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a header as lines of text, with the first column aligned left, the rest right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width for width in widths]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, [header, rule, *rows]))


def report(looks: Sequence[Mapping[str, float]], pairs: int) -> str:
    """The table of the first and the last evaluation, with 95% intervals for estimates."""
    before, after = looks[0], looks[-1]
    low, high = wilson(after["rewards/accuracies"], pairs)
    accuracy = f"{after['rewards/accuracies']:.3f} ({low:.2f} to {high:.2f})"
    rows = [
        ["preference accuracy", f"{before['rewards/accuracies']:.3f}", accuracy],
        ["reward margin", *(f"{look['rewards/margins']:.3f}" for look in (before, after))],
        ["KL to the reference (nats)", *(_mean(look, "kl") for look in (before, after))],
    ]
    if "gold" in after:
        rows.append(["mean gold reward", *(_mean(look, "gold") for look in (before, after))])
    return table(["", "before", "after"], rows)


def beside(looks: Mapping[str, Mapping[str, float]]) -> str:
    """A table of evaluations by name, with the KL, the gold reward and their 95% intervals."""
    rows = [[name, _mean(look, "kl"), _mean(look, "gold")] for name, look in looks.items()]
    return table(["", "KL to the reference (nats)", "mean gold reward"], rows)


def _mean(look: Mapping[str, float], name: str) -> str:
    return f"{look[name]:.2f} \u00b1 {1.96 * look[f'{name}_error']:.2f}"


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's confidence interval for a share of `count` independent trials."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    half = z * spread / (1 + z**2 / count)
    return middle - half, middle + half


def picture(
    path: Path,
    history: Sequence[Mapping[str, float]],
    looks: Sequence[Mapping[str, float]],
    frontier: Sequence[Numbers] = (),
) -> None:
    """Draws a run, if matplotlib is installed; see `draw`."""
    if HAS_MATPLOTLIB:
        draw(path, _columns(history), _columns(looks), frontier)
        say(f"\nPicture: {path}")


def _columns(rows: Sequence[Mapping[str, float]]) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]}


def draw(path: Path, training: Columns, held_out: Columns, frontier: Sequence[Numbers]) -> None:
    """Draws four panels in one file.

    **Arguments:**

    - `path`: the file; its suffix sets the format.
    - `training`: the metrics of every step.
    - `held_out`: the metrics of every evaluation, with `step`, `kl`, and `gold` if it is known.
    - `frontier`: KLs and the best gold rewards that they allow; empty if unknown.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, accuracy, margin, kl = figure.subplots(2, 2).flat
    _over_steps(loss, "loss", training, held_out, "loss (nats per pair)")
    loss.axhline(0.6931, color="black", linestyle=":", linewidth=1, label="log 2: no preference")
    _over_steps(accuracy, "rewards/accuracies", training, held_out, "accuracy (share ranked right)")
    accuracy.axhline(0.5, color="black", linestyle=":", linewidth=1, label="chance")
    _over_steps(margin, "rewards/margins", training, held_out, "reward margin")
    margin.axhline(0, color="black", linestyle=":", linewidth=1, label="reference")
    if "gold" in held_out:
        _gold_against_kl(kl, held_out, frontier)
    else:
        kl.plot(held_out["step"], held_out["kl"], "o-", color=HELD_OUT, label="fresh samples")
        kl.set(xlabel="step", ylabel="KL to the reference (nats per sample)")
    for axes in (loss, accuracy, margin, kl):
        axes.grid(alpha=0.3)
        axes.legend(loc="best", framealpha=0.9)
    figure.savefig(path, dpi=120)


def _over_steps(axes, name: str, training: Columns, held_out: Columns, label: str) -> None:
    smooth = moving_average(training[name])
    axes.plot(range(1, len(smooth) + 1), smooth, color=TRAINING, label="training, smoothed")
    axes.plot(held_out["step"], held_out[name], "o-", color=HELD_OUT, label="held out")
    axes.set(xlabel="step", ylabel=label)


def _gold_against_kl(axes, held_out: Columns, frontier: Sequence[Numbers]) -> None:
    axes.plot(*frontier, "--", color="black", linewidth=1, label="best possible at this KL")
    axes.plot(held_out["kl"], held_out["gold"], "o-", color=HELD_OUT, label="policy, during DPO")
    axes.set(xlabel="KL to the reference (nats per sample)", ylabel="mean gold reward")


def gold_picture(
    path: Path,
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    frontier: Sequence[Numbers],
) -> None:
    """Draws the gold reward of several runs against the KL, if matplotlib is installed.

    **Arguments:**

    - `path`: the file; its suffix sets the format.
    - `runs`: the evaluations of each run by its name, with `kl` and `gold`.
    - `frontier`: KLs and the best gold rewards that they allow.
    """
    if not HAS_MATPLOTLIB:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*frontier, "--", color="black", linewidth=1, label="best possible at this KL")
    for colour, (name, looks) in zip(RUNS, runs.items(), strict=False):
        points = _columns(looks)
        axes.plot(points["kl"], points["gold"], "o-", color=colour, label=name)
    axes.set(xlabel="KL to the reference (nats per sample)", ylabel="mean gold reward")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", framealpha=0.9)
    figure.savefig(path, dpi=120)
    say(f"\nPicture: {path}")


def moving_average(values: Numbers, window: int = 10) -> list[float]:
    """The mean of each value and those up to `window - 1` before it."""
    spans = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]
