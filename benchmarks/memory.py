"""The memory of one DPO step as a function of the completion's length, at a large vocabulary.

    python -m benchmarks.memory                       # the compiler's plan
    python -m benchmarks.memory --run 6               # and the measured peak, if it fits into 6 GB
    python -m benchmarks.memory --figure memory.png

It compares this library with plain JAX, which computes the logits of all positions. It also
measures this library with few ids: the difference is the cost of the vocabulary. The compiler's
plan takes no memory, so it exists for lengths that no machine could run.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .problem import Problem, tensor_shapes, write_checkpoints
from .workers import started

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
PROBLEM = Problem(pairs=1, vocab=151936)
# A vocabulary that costs almost nothing: the rest is the decoder's cost, mostly attention's.
FEW_IDS = 1024
TINY = Problem(pairs=1, prompt=8, vocab=97, width=16, layers=2, heads=2, feed_forward=24)


def ours(problem: Problem) -> Any:
    """This library's jitted step, and the shapes of its arguments."""
    import equinox as eqx
    import jax

    from dpo_eqx import models

    from .peers.ours import training
    from .problem import hf_config

    def make():
        config = models.read_config(hf_config(problem))
        policy = models.Transformer(config, key=jax.random.key(0))
        return training(problem, policy, policy)

    return eqx.filter_eval_shape(make)


def plain_jax(problem: Problem) -> Any:
    """Plain JAX's jitted step, and the shapes of its arguments."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from .peers.plain_jax import Llama, training

    shapes = tensor_shapes(problem).items()
    tensors = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes}

    def make(tensors):
        policy = Llama(tensors, problem)
        return training(problem, policy, policy)

    return eqx.filter_eval_shape(make, tensors)


SYSTEMS: dict[str, Callable[[Problem], Any]] = {"ours": ours, "plain_jax": plain_jax}


def planned(name: str, problem: Problem) -> dict[str, float]:
    """The compiler's plan for a system, in GB: arguments and temporaries."""
    import equinox as eqx
    import jax
    import numpy as np

    train, arguments = SYSTEMS[name](problem)
    kinds = (jax.ShapeDtypeStruct, np.ndarray)
    (frozen, *rest), static = eqx.partition(arguments, lambda leaf: isinstance(leaf, kinds))

    # Equinox's own `lower` needs real arrays, which would take memory.
    def step(frozen, rest):
        frozen, *rest = eqx.combine((frozen, *rest), static)
        return eqx.filter(train(frozen, *rest), eqx.is_array)

    compiled = jax.jit(step, donate_argnums=1).lower(frozen, rest).compile()
    analysis = compiled.memory_analysis()
    return {
        "arguments": analysis.argument_size_in_bytes / 1e9,
        "temporaries": analysis.temp_size_in_bytes / 1e9,
    }


def seen(name: str, problem: Problem) -> float:
    """The highest resident memory of a fresh process that trains, in GB."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(problem, Path(folder))
        with started(name, f"benchmarks.peers.{name}", problem, Path(folder)) as worker:
            worker.warm_up()
        return worker.peak


def measure(problem: Problem, lengths: Sequence[int], limit: float) -> list[dict[str, Any]]:
    """A row for each length. It runs a case only if its plan is below `limit` GB."""
    rows = []
    for length in lengths:
        longer = dataclasses.replace(problem, completion=length)
        fewer = dataclasses.replace(longer, vocab=min(FEW_IDS, problem.vocab))
        row: dict[str, Any] = {"completion": length}
        row["few ids"] = planned("ours", fewer)["temporaries"]
        for name in SYSTEMS:
            plan = planned(name, longer)
            row[name] = plan["temporaries"]
            fits = sum(plan.values()) < limit
            row[f"{name}, resident"] = seen(name, longer) if fits else None
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    cells = (
        "" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()
    )
    return "| " + " | ".join(cells) + " |"


def draw(rows: Sequence[dict[str, Any]], problem: Problem, path: Path) -> None:
    """The curves, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    lengths = [row["completion"] for row in rows]
    for name, label, colour in (
        ("plain_jax", "plain JAX, all logits", "tab:orange"),
        ("ours", "dpo_eqx", "tab:blue"),
        ("few ids", f"dpo_eqx, {FEW_IDS} ids", "tab:cyan"),
    ):
        axes.plot(lengths, [row[name] for row in rows], "o-", color=colour, label=label)
    logits = [2 * (problem.prompt + length) * problem.vocab * 4e-9 for length in lengths]
    axes.plot(lengths, logits, ":", color="grey", label="the logits of both rows, once")
    axes.set(xscale="log", yscale="log", xticks=lengths, xticklabels=lengths)
    axes.minorticks_off()
    axes.set(xlabel="completion tokens", ylabel="compiled temporaries (GB)")
    axes.set_title(f"{problem.pairs} pair, vocabulary {problem.vocab}, width {problem.width}")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument(
        "--run", type=float, default=0.0, metavar="GB", help="run what fits into it"
    )
    parser.add_argument("--figure", type=Path, help="a file to draw the curves into")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to test that it runs")
    options = parser.parse_args(arguments)
    problem = TINY if options.quick else PROBLEM
    print(f"{problem}; GB: temporaries as planned, and resident where it was run")
    few = f"ours, {min(FEW_IDS, problem.vocab)} ids"
    print(f"| completion | {few} | ours | ours, resident | plain JAX | plain JAX, resident |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = measure(problem, options.lengths, options.run)
    if options.figure:
        draw(rows, problem, options.figure)


if __name__ == "__main__":
    main()
