"""How a script of the gallery runs: its options, and where its picture and its table go.

A script is an entry. It gives three functions: one that computes, one that makes the table and one
that draws. This file computes nothing about preferences.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure

Size = TypeVar("Size")
Results = TypeVar("Results")


def run(
    name: str,
    *,
    full: Size,
    quick: Size,
    compute: Callable[[Size], Results],
    table: Callable[[Results], str],
    picture: Callable[[Results], Figure],
    arguments: Sequence[str] | None = None,
) -> None:
    """Computes an entry, prints its table, and writes `<name>.md` and `<name>.png`.

    `full` and `quick` are what `compute` takes: how much is run. In a notebook the flags of the
    kernel are not ours, so unknown flags are left alone.
    """
    mpl.use("agg", force=False)
    parser = argparse.ArgumentParser(description=f"The entry {name!r} of the gallery.")
    parser.add_argument("--quick", action="store_true", help="A short form, for a first look.")
    parser.add_argument(
        "--output", type=Path, default=Path("."), help="Folder for the picture and the table."
    )
    options, _ = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    results = compute(quick if options.quick else full)
    text = table(results)
    print(text, flush=True)
    (options.output / f"{name}.md").write_text(text + "\n")
    picture(results).savefig(options.output / f"{name}.png", dpi=120, bbox_inches="tight")
    print(f"\n{name}: {time.perf_counter() - start:.0f} s", flush=True)
