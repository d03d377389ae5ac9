"""Draws the plots of the page of benchmarks from its tables. A test compares them with the files.

    python docs/scripts/plots.py

It measures nothing and holds no figures. A plot changes if its table in `RESULTS.md` changes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from svg import Drawing

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "drawings"
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
WIDTH, LEFT, LINE = 660, 255, 24  # pixels of a plot, of the names in it, and of a bar with its gap

Row = dict[str, str]
Bar = tuple[str, str]


def tables(heading: str) -> Iterator[list[Row]]:
    """The tables of the section with that heading, each as rows by the names of the columns."""
    text = RESULTS.read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for part in section.split("\n\n"):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        if lines:
            header, _, *rows = [[cell.strip() for cell in x.strip("|").split("|")] for x in lines]
            yield [dict(zip(header, row, strict=True)) for row in rows]


def bars_of(heading: str, name: str, value: str, **equal: str) -> list[Bar]:
    """Names and values of rows of the first table of a section that has the column `value`.

    `equal` selects rows by their values in other columns.
    """
    table = next(table for table in tables(heading) if value in table[0])
    return [
        (row[name].replace("`", ""), row[value])
        for row in table
        if all(row[column] == wanted for column, wanted in equal.items())
    ]


def bar_plot(label: str, panels: dict[str, list[Bar]]) -> Drawing:
    """Panels of horizontal bars under each other, each with its title and its own scale from 0."""
    lines = sum(len(bars) + 2 for bars in panels.values())
    drawing, y = Drawing(WIDTH, LINE * lines, label), 0.0
    for title, bars in panels.items():
        drawing.text(0, y + 18, title, "bold", "start")
        scale = (WIDTH - LEFT - 70) / max(float(value) for _, value in bars)
        for name, value in bars:
            y += LINE
            ours = name.startswith("**")
            drawing.text(LEFT - 10, y + 19, name.strip("*"), "bold" if ours else "", "end")
            length = round(scale * float(value), 1)
            drawing.rect(LEFT, y + 5, length, 18, "first" if ours else "other")
            drawing.text(LEFT + length + 8, y + 19, value, "small", "start")
        y += 2 * LINE
    return drawing


def throughput(heading: str, titles: dict[str, str], column: str) -> dict[str, list[Bar]]:
    """A panel of tokens per second for each title, of the rows with that value in `column`."""
    return {
        f"{title}: tokens per second, more is better": bars_of(
            heading, "system", "tokens/s", **{column: value}
        )
        for value, title in titles.items()
    }


def gpu() -> Drawing:
    """The throughput of a step on a GPU."""
    shapes = {shape: shape for shape in ("Qwen3-0.6B", "Llama-3.2-1B")}
    panels = throughput("One step on a GPU", shapes, "shape")
    return bar_plot("Tokens per second of a step on a GPU", panels)


def step() -> Drawing:
    """Time and memory of a step on a CPU, of all systems."""
    heading = "One step, beside other systems"
    panels = {
        "seconds for a step, less is better": bars_of(heading, "system", "median"),
        "resident memory at its peak, GB": bars_of(heading, "system", "peak GB"),
    }
    return bar_plot("Seconds and memory of a step on a CPU", panels)


def packing() -> Drawing:
    """The throughput of three ways to form batches, of real tokens only."""
    bars = dict(bars_of("One step, beside other systems", "batches", "real tokens/s"))
    marked = [(f"**{name}**" if "packed" in name else name, value) for name, value in bars.items()]
    return bar_plot("Packing", {"real tokens per second, more is better": marked})


def drawn() -> Drawing:
    """The speed of drawing completions, for one row and for more."""
    batches = {batch: f"batches of {batch}" for batch in ("1", "8", "32")}
    panels = throughput("Drawing completions", batches, "batch")
    return bar_plot("Tokens per second while drawing completions", panels)


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "bench_gpu": gpu,
    "bench_step": step,
    "bench_packing": packing,
    "bench_drawing": drawn,
}


if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        draw().write(FOLDER / f"{name}.svg")
