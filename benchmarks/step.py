"""One DPO step of this library and of other systems: time, memory, and the floor of arithmetic.

    python -m benchmarks.step                                      # ours and plain JAX
    python -m benchmarks.step --python-torch ENV/bin/python        # and PyTorch, TRL
    python -m benchmarks.step --systems ours,torch --prompt 384 --reference precomputed

Each system is a process of its own, and all take turns for a few rounds. They start from the same
two checkpoints, policy and reference, and see the same token ids. The losses of the first steps are
compared, since a ratio of times means nothing if the results differ.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import problem as problems
from .problem import PRODUCT, Problem, floor_flops, write_checkpoints
from .workers import Worker, WorkerError, alternate, started


@dataclasses.dataclass(frozen=True)
class System:
    """How to run a system: its module in `peers/`, and the interpreter that it needs."""

    module: str
    environment: str = "jax"


SYSTEMS = {
    "ours": System("ours"),
    "before": System("ours", "before"),
    "plain_jax": System("plain_jax"),
    "torch": System("torch_loop", "torch"),
    "trl": System("trl_trainer", "torch"),
    "tunix": System("tunix_trainer", "tunix"),
    "levanter": System("levanter_trainer", "levanter"),
    "easydel": System("easydel_trainer", "easydel"),
}
RATES = {"matmul": System("matmul"), "torch_matmul": System("torch_matmul", "torch")}
ENVIRONMENTS = ("torch", "tunix", "levanter", "easydel")
# The number of products in each turn that measures the machine's rate: they are short.
PRODUCTS = 5


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    problems.add_arguments(parser)
    parser.add_argument("--systems", help=f"comma-separated, of {','.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each system in each round")
    parser.add_argument("--before", type=Path, help="a folder with another dpo_eqx")
    parser.add_argument("--json", type=Path, help="a file to write all measurements to")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to test that it runs")
    for name in ENVIRONMENTS:
        parser.add_argument(f"--python-{name}", metavar="PATH", help=f"interpreter that has {name}")
    return parser.parse_args(arguments)


def quick(problem: Problem) -> Problem:
    """The same problem at a tiny size."""
    tiny = {"vocab": 97, "width": 16, "layers": 2, "heads": 2, "feed_forward": 24}
    # A large learning rate moves weights far, which shows differences between systems.
    return dataclasses.replace(problem, pairs=2, prompt=6, completion=5, learning_rate=1e-3, **tiny)


def measure(
    problem: Problem,
    names: Sequence[str],
    pythons: dict[str, str | None],
    *,
    rounds: int,
    steps: int = 1,
    before: Path | None = None,
) -> tuple[list[Worker], dict[str, str]]:
    """Runs the systems in turns.

    **Returns:**

    The workers in the order of `names`, and the reason of each failure by name.
    """
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_checkpoints(problem, folder)
        workers = []
        for name in names:
            system = (SYSTEMS | RATES)[name]
            module, python = f"benchmarks.peers.{system.module}", pythons.get(system.environment)
            other = before if system.environment == "before" else None
            process = started(name, module, problem, folder, python=python, before=other)
            worker = stack.enter_context(process)
            try:
                worker.warm_up()
                workers.append(worker)
            except WorkerError as error:
                failures[name] = str(error)
        alternate(workers, rounds, dict.fromkeys(names, steps) | dict.fromkeys(RATES, PRODUCTS))
    return workers, failures


def loss_tolerance(problem: Problem) -> float:
    """How far rounding may move a loss.

    The loss's slope in each of a pair's four log-probabilities is at most `beta`. A log-probability
    is about `completion * log(vocab)` nats, and may have a relative error of one unit in the last
    place of float32. AdamW adds no significant error: if rounding flips the sign of a first update,
    the gradient that multiplies it is rounding, too.
    """
    nats = problem.completion * math.log(problem.vocab)
    return 4 * problem.beta * nats * 2.0**-23


def agree(one: Sequence[float], other: Sequence[float], problem: Problem) -> bool:
    """Whether the losses of the first steps are the same up to rounding."""
    tolerance = loss_tolerance(problem)
    return all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def row(
    worker: Worker, everyone: dict[str, Worker], problem: Problem, rate: float | None
) -> dict[str, Any]:
    """A system's row in the table: times in seconds, memory in GB."""
    first = next(iter(everyone.values()))

    def ratio(name: str) -> float | None:
        return worker.median / everyone[name].median if name in everyone else None

    return {
        "system": worker.name,
        "median": worker.median,
        "min": min(worker.times),
        "of torch": ratio("torch"),
        "of trl": ratio("trl"),
        "of levanter": ratio("levanter"),
        "floor / step": floor_flops(problem) / rate / worker.median if rate else None,
        "peak GB": worker.peak,
        "first step": worker.first,
        "losses": worker.losses,
        "same": agree(worker.losses, first.losses, problem),
        "version": worker.version,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as an aligned Markdown table."""

    def text(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return "yes" if value else "NO"
        if isinstance(value, list):
            return " ".join(f"{each:.6f}" for each in value)
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    columns = [column for column in rows[0] if any(r[column] is not None for r in rows)]
    lines = [columns, ["---"] * len(columns)] + [[text(r[c]) for c in columns] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def rates(workers: Sequence[Worker]) -> dict[str, float]:
    """The rates of matrix products by library, in floating-point operations a second."""
    flops = 2 * PRODUCT**3
    return {worker.name: flops / worker.median for worker in workers if worker.name in RATES}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints the table."""
    options = parse(arguments)
    problem = problems.from_arguments(options)
    problem = quick(problem) if options.quick else problem
    pythons = {name: getattr(options, f"python_{name}") for name in ENVIRONMENTS}
    there = {"jax", *(name for name, python in pythons.items() if python)}
    there |= {"before"} if options.before else set()
    names = [name for name, system in SYSTEMS.items() if system.environment in there]
    names = options.systems.split(",") if options.systems else names
    machine = [name for name, system in RATES.items() if system.environment in there]
    settings = {"rounds": options.rounds, "steps": options.steps, "before": options.before}
    workers, failures = measure(problem, [*names, *machine], pythons, **settings)
    found, flops = rates(workers), floor_flops(problem)
    systems = {worker.name: worker for worker in workers if worker.name not in RATES}
    rate = max(found.values(), default=None)
    rows = [row(worker, systems, problem, rate) for worker in systems.values()]
    print(f"{problem}\n{flops / 1e9:.1f} GFLOP a step at least; float32 products:", end=" ")
    print(", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in found.items()))
    print(table(rows) if rows else "nothing ran")
    for name, why in failures.items():
        print(f"\nNot measured: {name}. {why}")
    if options.json:
        times = {worker.name: worker.times for worker in workers}
        report = {"problem": dataclasses.asdict(problem), "rows": rows, "rates": found}
        options.json.write_text(json.dumps({**report, "times": times}, indent=1))


if __name__ == "__main__":
    main()
