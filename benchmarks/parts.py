"""The parts of a step, each compiled and timed alone, with the least arithmetic that each needs.

    python -m benchmarks.parts
    python -m benchmarks.parts --prompt 384

All parts take turns in one process. In a whole step XLA fuses operations across parts, so the sum
of the parts differs slightly from the step.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import dpo_eqx as dpx
from dpo_eqx import losses, models

from . import problem as problems
from .peers.ours import batch_of
from .problem import PRODUCT, Problem, floor_flops, hf_config


class Part(NamedTuple):
    """A function to time, its arguments, and its least floating-point operations."""

    name: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float


def forward_flops(problem: Problem) -> tuple[int, int]:
    """The operations of weight products in a forward pass: of the layers, and the unembedding."""
    scored = 2 * problem.pairs * problem.completion
    unembedding = 2 * scored * problem.width * problem.vocab
    # A step costs 4 forward passes with a live reference, else 3: the backward pass costs 2.
    return floor_flops(problem) // (3 if problem.precomputed else 4) - unembedding, unembedding


def parts_of(problem: Problem) -> list[Part]:
    """The whole step, and its parts."""
    policy = models.Transformer(models.read_config(hf_config(problem)), key=jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, batch_of(problem))
    arrays, static = eqx.partition(policy, eqx.is_array)
    optimizer = optax.adamw(problem.learning_rate, weight_decay=problem.weight_decay)
    state = optimizer.init(arrays)
    measured = partial(dpx.score_pairs, metrics=("entropy", "accuracy", "logits"))
    rows = jnp.concatenate([batch.prompt.ids, batch.chosen.ids, batch.rejected.ids], axis=1)
    targets = rows[:, problem.prompt :]
    hidden = jax.random.normal(jax.random.key(1), (*targets.shape, problem.width))
    widths = (problem.completion, problem.completion)

    def whole(score, arrays, state, batch):
        step = dpx.make_step(losses.dpo, optimizer, score=score)
        policy, state, metrics = step(eqx.combine(arrays, static), state, batch, reference)
        return eqx.filter(policy, eqx.is_array), state, metrics

    def score(arrays, batch):
        return dpx.score_pairs(eqx.combine(arrays, static), batch)

    def layers(arrays, rows):
        policy = eqx.combine(arrays, static)
        layout = dpx.Layout(jnp.asarray(problem.prompt), problem.prompt, widths)
        return jax.vmap(lambda row: policy.hidden(row, layout))(rows)

    def unembed(hidden, unembedding):
        return dpx.linear_token_log_probs(hidden, unembedding, targets)

    def slope(function, wanted):
        return jax.grad(lambda *given: (function(*given) ** 2).sum(), wanted)

    reference = dpx.snapshot(policy)
    body, head = forward_flops(problem)
    given = hidden, policy.unembedding
    return [
        *(
            Part(name, jax.jit(partial(whole, by)), (arrays, state, batch), 4 * (body + head))
            for name, by in {"step": dpx.score_pairs, "step, with token metrics": measured}.items()
        ),
        Part("score, as of the reference", jax.jit(score), (arrays, batch), body + head),
        Part("layers, forward", jax.jit(layers), (arrays, rows), body),
        Part("layers, and backward", jax.jit(slope(layers, 0)), (arrays, rows), 3 * body),
        Part("unembedding, forward", jax.jit(unembed), given, head),
        Part("unembedding, and backward", jax.jit(slope(unembed, (0, 1))), given, 3 * head),
        Part("AdamW", jax.jit(optimizer.update), (arrays, state, arrays), 0),
    ]


def timed(parts: Sequence[Part], rounds: int) -> list[float]:
    """Median seconds of each part."""
    for part in parts:
        jax.block_until_ready(part.run(*part.arguments))  # compiles
    times: list[list[float]] = [[] for _ in parts]
    for _ in range(rounds):
        for part, seen in zip(parts, times, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(part.run(*part.arguments))
            seen.append(time.perf_counter() - started)
    return [statistics.median(seen) for seen in times]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    problems.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    square = jnp.ones((PRODUCT, PRODUCT))
    product = Part("product", jax.jit(jnp.matmul), (square, square), 2 * PRODUCT**3)
    parts = [product, *parts_of(problems.from_arguments(options))]
    seconds = timed(parts, options.rounds)
    rate = product.flops / seconds[0]
    print(f"float32 products: {rate / 1e9:.0f} GFLOP/s\n")
    print("| part | s | GFLOP | s at that rate | of the floor |\n| --- | --- | --- | --- | --- |")
    for part, spent in zip(parts[1:], seconds[1:], strict=True):
        floor = part.flops / rate
        ratio = f"{floor / spent:.2f}" if floor else ""
        print(f"| {part.name} | {spent:.3f} | {part.flops / 1e9:.1f} | {floor:.3f} | {ratio} |")


if __name__ == "__main__":
    main()
