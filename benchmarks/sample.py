"""Drawing completions: tokens per second and the time to the first token, beside other systems.

    python -m benchmarks.sample                                     # ours and plain JAX
    python -m benchmarks.sample --python-torch ENV/bin/python       # and `transformers`' generate
    python -m benchmarks.sample --batches 1 8 --prompts 128 --dtype bfloat16
    python -m benchmarks.sample --systems ours,transformers --top-p 0.95   # not greedily

Each system is a process of its own, and all take turns. They draw greedily from the same weights
and prompts, so that their tokens can be compared; with `--top-p` they sample. The floor of a token
is the larger of two times: that of reading the weights and the cached keys and values once, and
that of the arithmetic. The rates are measured on a CPU; on an accelerator they are those of the
data sheet, in bfloat16.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_eqx.sharding._targets import chip_of_kind

from .accelerator import device_name
from .problem import FIRST_ID, PRODUCT, Problem, write_checkpoints
from .step import table
from .turns import WARM_UP
from .workers import Worker, WorkerError, alternate, started

SYSTEMS = {"ours": "sample_ours", "plain_jax": "sample_plain_jax", "transformers": "sample_torch"}
RATES = {"matmul": "matmul", "bandwidth": "bandwidth"}
# The tokens of each completion that are compared; later ones may differ by a near tie.
COMPARED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """Completions of `new` tokens, for every batch size with every length of prompts.

    They are greedy, or drawn at temperature 1 from the likeliest tokens that sum to `top_p`.
    """

    batches: Sequence[int] = (1, 8, 32)
    prompts: Sequence[int] = (128, 1024)
    new: int = 128
    rounds: int = 3
    top_p: float | None = None
    dtype: str = "float32"
    vocab: int = 32000
    width: int = 512
    layers: int = 8
    heads: int = 8
    feed_forward: int = 1408

    @property
    def points(self) -> list[tuple[int, int]]:
        """The batch sizes and prompt lengths, in the order of the measurement."""
        return [(batch, prompt) for prompt in self.prompts for batch in self.batches]

    @property
    def problem(self) -> Problem:
        """The shape, as the problem of a checkpoint."""
        names = ("vocab", "width", "layers", "heads", "feed_forward")
        return Problem(**{name: getattr(self, name) for name in names})

    def calls(self) -> Iterator[tuple[int, int, int]]:
        """The batch, the prompt and the new tokens of every call, after which a system waits.

        The first calls are there to compare tokens. The first two of each point compile. Neither
        are timed.
        """
        yield from [(*self.points[0], COMPARED)] * WARM_UP
        for point in self.points:
            yield from [(*point, 1), (*point, self.new)] * (1 + self.rounds)

    def ids(self, batch: int, prompt: int) -> np.ndarray:
        """Random prompts without padding, int32 of shape `(batch, prompt)`."""
        rng = np.random.default_rng(batch * prompt)
        return rng.integers(FIRST_ID, self.vocab, (batch, prompt), dtype=np.int32)


TINY = {"vocab": 97, "width": 16, "layers": 2, "heads": 2, "feed_forward": 24}


def checksum(drawing: Drawing, ids: np.ndarray) -> float:
    """A number that differs if the first ids of completions do; 0 if they were sampled."""
    if drawing.top_p is not None:
        return 0.0
    first = np.asarray(ids)[:, :COMPARED].astype(np.float64)
    return float((first * np.arange(1, 1 + first.size).reshape(first.shape)).sum())


def weights_read(drawing: Drawing) -> int:
    """The numbers in all weights that a token needs: layers and unembedding, not the embedding."""
    layer = 4 * drawing.width**2 + 3 * drawing.width * drawing.feed_forward
    return drawing.layers * layer + drawing.width * drawing.vocab


def floors(
    drawing: Drawing, batch: int, prompt: int, *, rate: float, bandwidth: float
) -> tuple[float, float]:
    """The least seconds to the first token, and for each further token of the whole batch.

    The first one needs the products of the prompt with the weights of the layers, and one row of
    the unembedding. A further one reads every weight, and the keys and values so far, once.
    """
    size = 2 if drawing.dtype == "bfloat16" else 4
    weights, head = weights_read(drawing), drawing.width * drawing.vocab
    first = 2 * batch * (prompt * (weights - head) + head) / rate
    seen = prompt + drawing.new / 2
    cached = 2 * drawing.layers * batch * seen * drawing.width
    attention = 4 * batch * seen * drawing.width * drawing.layers
    arithmetic = (2 * batch * weights + attention) / rate
    return first, max(size * (weights + cached) / bandwidth, arithmetic)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shown = Drawing()
    parser.add_argument("--batches", type=int, nargs="+", default=shown.batches)
    parser.add_argument("--prompts", type=int, nargs="+", default=shown.prompts)
    for name in ("new", "rounds", "vocab", "width", "layers", "heads"):
        parser.add_argument(f"--{name}", type=int, default=getattr(shown, name))
    parser.add_argument("--feed-forward", type=int, default=shown.feed_forward)
    parser.add_argument("--top-p", type=float, metavar="P", help="sample, with this top-p")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=shown.dtype)
    parser.add_argument("--systems", help=f"comma-separated, of {','.join(SYSTEMS)}")
    parser.add_argument("--python-torch", metavar="PATH", help="interpreter with transformers")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to test that it runs")
    return parser.parse_args(arguments)


def measure(
    drawing: Drawing, names: Sequence[str], python: str | None
) -> tuple[dict[str, Worker], dict[str, str]]:
    """Runs the systems in turns.

    **Returns:**

    The workers and the reasons of failures, both by name. The times of a system are those of
    `Drawing.calls` after the warm-up.
    """
    workers: dict[str, Worker] = {}
    failures: dict[str, str] = {}
    # All systems hold an accelerator's memory at the same time.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_checkpoints(drawing.problem, folder)
        for name in names:
            module = f"benchmarks.peers.{(SYSTEMS | RATES)[name]}"
            path = python if name == "transformers" else None
            process = started(name, module, drawing, folder, python=path)
            worker = stack.enter_context(process)
            try:
                worker.warm_up()
                workers[name] = worker
            except WorkerError as error:
                failures[name] = str(error)
        calls = dict.fromkeys(names, 2) | dict.fromkeys(RATES, 1)
        alternate(list(workers.values()), len(drawing.points) * (1 + drawing.rounds), calls)
    return workers, failures


def seconds(worker: Worker, drawing: Drawing, point: int) -> tuple[float, float]:
    """The median seconds to the first token, and of a whole call, at one point."""
    of_point = 2 * (1 + drawing.rounds)
    times = worker.times[point * of_point : (point + 1) * of_point][2:]
    return statistics.median(times[0::2]), statistics.median(times[1::2])


def row(
    worker: Worker,
    drawing: Drawing,
    point: int,
    base: Worker | None,
    machine: dict[str, float],
) -> dict[str, Any]:
    """A system's row at one point; ratios are of `transformers`' tokens per second."""
    batch, prompt = drawing.points[point]
    first, whole = seconds(worker, drawing, point)
    floor_first, floor_token = floors(drawing, batch, prompt, **machine)
    floor = floor_first + (drawing.new - 1) * floor_token
    return {
        "prompt": prompt,
        "batch": batch,
        "system": worker.name,
        "tokens/s": batch * drawing.new / whole,
        "of transformers": seconds(base, drawing, point)[1] / whole if base else None,
        "first token s": first,
        "ms a token": 1e3 * (whole - first) / max(drawing.new - 1, 1),
        "floor / time": floor / whole,
        "peak GB": worker.peak,
    }


def measured_rates(workers: dict[str, Worker]) -> dict[str, float]:
    """Operations and bytes per second of this machine's CPUs."""
    return {
        "rate": 2 * PRODUCT**3 / workers["matmul"].median,
        "bandwidth": workers["bandwidth"].losses[0] / workers["bandwidth"].median,
    }


def rates_of(device: str) -> dict[str, float]:
    """Operations and bytes per second of an accelerator, from its data sheet; 1 if not known."""
    chip = chip_of_kind(device)
    return {"rate": chip.rate or 1.0, "bandwidth": chip.bandwidth or 1.0}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints the table."""
    options = parse(arguments)
    names = [field.name for field in dataclasses.fields(Drawing)]
    drawing = Drawing(**{name: getattr(options, name) for name in names})
    if options.quick:
        sizes = {"batches": (1, 2), "prompts": (6,), "new": 5, "rounds": 1}
        drawing = dataclasses.replace(drawing, **sizes, **TINY)
    left_out = {"transformers"} if options.python_torch is None else set()
    # It is greedy.
    left_out |= {"plain_jax"} if drawing.top_p is not None else set()
    systems = [name for name in SYSTEMS if name not in left_out]
    systems = options.systems.split(",") if options.systems else systems
    device = device_name()
    measured = RATES if device == "cpu" else {}
    workers, failures = measure(drawing, [*systems, *measured], options.python_torch)
    machine = measured_rates(workers) if measured else rates_of(device)
    ran = [workers[name] for name in systems if name in workers]
    print(f"{drawing}\n{weights_read(drawing) / 1e6:.1f} M weights are read for a token;", end=" ")
    print(f"{machine['rate'] / 1e9:.0f} GFLOP/s, {machine['bandwidth'] / 1e9:.1f} GB/s")
    base = workers.get("transformers")
    points = range(len(drawing.points))
    rows = [
        row(worker, drawing, point, base, machine)
        for point, worker in itertools.product(points, ran)
    ]
    print(table(rows) if rows else "nothing ran")
    print("checksums:", ", ".join(f"{worker.name} {worker.losses[0]:.0f}" for worker in ran))
    for name, why in failures.items():
        print(f"\nNot measured: {name}. {why}")


if __name__ == "__main__":
    main()
