"""One DPO step on an accelerator, at the shapes of Qwen3-0.6B and Llama-3.2-1B.

    python -m benchmarks.accelerator                                   # ours and plain JAX
    python -m benchmarks.accelerator --python-torch ENV/bin/python     # and PyTorch
    python -m benchmarks.accelerator --pairs 16 --remat --microbatches 4
    python -m benchmarks.accelerator --systems ours,ours_unfused       # without cuDNN's attention
    python -m benchmarks.accelerator --systems ours,ours_unrolled      # without a loop over layers
    python -m benchmarks.accelerator --quick                           # tiny, on any machine

Compute is in bfloat16, AdamW in float32, and the reference runs live. Each system is a fresh
process that has the accelerator to itself. The fraction of the peak is the least arithmetic of a
step, with nothing computed twice (`large.flops`), over the chip's dense rate in bfloat16.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .large import Case, flops
from .step import table
from .workers import WorkerError, started

# Dense bfloat16 rates from data sheets, in 1e12 operations a second, by part of the device's name.
PEAKS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6": 918,
    "TPU v4": 275,
}
SYSTEMS = {
    "ours": "large_ours",
    "ours_unfused": "large_ours",
    "ours_unrolled": "large_ours",
    "plain_jax": "large_plain_jax",
    "torch": "large_torch",
}
REAL, TINY = ("qwen3-0.6b", "llama-3.2-1b"), ("tiny-qwen3", "tiny-llama")


def device_name() -> str:
    """JAX's name of the device, from a process of its own, which frees the device when it ends."""
    asked = [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def peak_rate(device: str) -> float | None:
    """The chip's dense bfloat16 rate in operations a second, if it is known."""
    found = (rate for name, rate in PEAKS.items() if name in device)
    rate = next(found, None)
    return None if rate is None else rate * 1e12


def measure(name: str, case: Case, steps: int, python: str | None) -> dict[str, Any]:
    """A row of the table, or the reason for which it is missing."""
    row: dict[str, Any] = {"shape": case.shape, "system": name}
    how = {"fused": name != "ours_unfused", "unroll": name == "ours_unrolled"}
    case = dataclasses.replace(case, **how)
    module = f"benchmarks.peers.{SYSTEMS[name]}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with started(name, module, case, Path(folder), python=python) as worker:
                worker.warm_up()
                worker.turn(steps)
        except WorkerError as error:
            return row | {"failed": str(error)}
    return row | {
        "median s": worker.median,
        "tokens/s": round(case.tokens / worker.median),
        "TFLOP/s": flops(case) / worker.median / 1e12,
        "device GB": worker.device_peak,
        "host GB": worker.peak,
        "first step s": worker.first,
        "version": worker.version,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", help=f"comma-separated; by default {','.join(REAL)}")
    parser.add_argument("--systems", help=f"comma-separated, of {','.join(SYSTEMS)}")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument(
        "--remat", action="store_true", help="recompute layers in the backward pass"
    )
    parser.add_argument("--microbatches", type=int, default=1, help="microbatches of our step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--peak", type=float, help="dense bf16 rate of the chip, in TFLOP/s")
    parser.add_argument("--python-torch", metavar="PATH", help="interpreter that has PyTorch")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test that it runs")
    return parser.parse_args(arguments)


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases of the options, one for each shape."""
    shapes = TINY if options.quick else REAL
    shapes = options.shapes.split(",") if options.shapes else shapes
    sizes = (2, 8, 6) if options.quick else (options.pairs, options.prompt, options.completion)
    pairs, prompt, completion = sizes
    lengths = {"pairs": pairs, "prompt": prompt, "completion": completion}
    settings = {"remat": options.remat, "microbatches": options.microbatches}
    return [Case(shape=shape, **lengths, **settings) for shape in shapes]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints the table."""
    options, device = parse(arguments), device_name()
    peak = options.peak * 1e12 if options.peak else peak_rate(device)
    names = ["ours", "plain_jax", *(["torch"] if options.python_torch else [])]
    names = options.systems.split(",") if options.systems else names
    pythons = {"torch": options.python_torch}
    rows = [
        measure(name, case, options.steps, pythons.get(name))
        for case in cases(options)
        for name in names
    ]
    print(f"{device}; {cases(options)[0]}")
    print(
        f"dense bf16 peak: {f'{peak / 1e12:.0f} TFLOP/s' if peak else 'not known for this device'}"
    )
    ran = [row for row in rows if "failed" not in row]
    of_peak = [row | {"of peak": row["TFLOP/s"] * 1e12 / peak if peak else None} for row in ran]
    print(table(of_peak) if of_peak else "nothing ran")
    for row in rows:
        if "failed" in row:
            print(f"\nNot measured: {row['system']} at {row['shape']}. {row['failed']}")


if __name__ == "__main__":
    main()
