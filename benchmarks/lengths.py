"""The cost of a step against the work in it: pairs, depth, microbatches.

    python -m benchmarks.lengths                   # all three; a few minutes
    python -m benchmarks.lengths pairs --rounds 3  # one of them

Each row is a fresh process. Below each table stand the straight line that fits it best and the
worst row's distance from the line: a curve needs an explanation.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .problem import Problem, floor_flops, write_checkpoints
from .step import quick
from .workers import Worker, started

SWEEPS = {
    "pairs": (Problem(), (1, 2, 4, 8, 16, 32)),
    "layers": (Problem(), (2, 4, 8, 16)),
    "microbatches": (Problem(pairs=16), (1, 2, 4, 8, 16)),
}


def measure(problem: Problem, rounds: int) -> Worker:
    """Times steps of this library in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(problem, Path(folder))
        with started("ours", "benchmarks.peers.ours", problem, Path(folder)) as worker:
            worker.warm_up()
            worker.turn(rounds)
        return worker


def straight_line(x: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float]:
    """The line that minimises the sum of squared relative errors.

    **Returns:**

    The intercept in seconds, the slope in seconds for each unit, and the largest relative distance
    of a point from the line.
    """
    y = np.asarray(seconds)
    design = np.stack([np.ones(len(y)), np.asarray(x)], axis=1) / y[:, None]
    (begin, slope), *_ = np.linalg.lstsq(design, np.ones(len(y)))
    return float(begin), float(slope), float(np.abs(design @ [begin, slope] - 1).max())


def sweep(name: str, *, rounds: int, tiny: bool) -> None:
    """Measures one of the sweeps, and prints its table."""
    problem, values = SWEEPS[name]
    problem, values = (quick(problem), values[:2]) if tiny else (problem, values)
    problem = dataclasses.replace(problem, pairs=SWEEPS[name][0].pairs)
    print(f"| {name} | median s | min s | GFLOP/s of the floor | peak GB | first step s |")
    print("| --- | --- | --- | --- | --- | --- |")
    medians = []
    for value in values:
        longer = dataclasses.replace(problem, **{name: value})
        worker = measure(longer, rounds)
        medians.append(worker.median)
        rate = floor_flops(longer) / worker.median / 1e9
        times = f"{worker.median:.3f} | {min(worker.times):.3f}"
        print(
            f"| {value} | {times} | {rate:.0f} | {worker.peak:.3f} | {worker.first:.2f} |",
            flush=True,
        )
    begin, slope, off = straight_line(values, medians)
    print(f"{begin:.3f} s + {slope:.4f} s x {name}; the worst row is {100 * off:.0f}% off it\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each requested sweep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", nargs="*", metavar="|".join(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=5, help="timed steps")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to test that it runs")
    options = parser.parse_args(arguments)
    for name in options.sweeps:
        sweep(name, rounds=options.rounds, tiny=options.quick)


if __name__ == "__main__":
    main()
