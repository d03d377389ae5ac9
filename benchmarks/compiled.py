"""What one DPO step needs of each device, read from programs that are compiled and do not run.

    python -m benchmarks.compiled                                   # all shapes on all targets
    python -m benchmarks.compiled --targets h100:8 --shapes qwen3-0.6b
    python -m benchmarks.compiled --quick                           # tiny, for CPU devices

It compares this library with plain JAX, which has the logits of all positions of `2 * pairs` rows.
The batch has two pairs of 512 + 512 tokens for each device. Both have AdamW in float32, compute in
bfloat16, layers that are recomputed (`--no-remat` stores them) and a live reference. The mesh is
`fsdp` over all devices. A target whose compiler is not installed is left out.
`dpo_eqx.sharding.plan` says what the numbers mean. "Of the ring" are the bytes sent over those that
a device must send at least. "Left" is the rest of the device's memory; it is negative if the step
does not fit.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx.sharding._plan import TooLargeError
from dpo_eqx.sharding._targets import find_target

from .large import LLAMA, SHAPES
from .peers.large_plain_jax import log_probs
from .peers.plain_jax import dpo

LLAMA_8B = {
    **LLAMA,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "intermediate_size": 14336,
    "tie_word_embeddings": False,
}
ALL_SHAPES = {**SHAPES, "llama-3.1-8b": LLAMA_8B}
COMPARED = ("qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b")
TARGETS = ("h100", "h100:8", "v5e:2x2", "v5p:2x2x2", "v6e:4x4")
PAIRS_OF_A_DEVICE, PROMPT, COMPLETION, BETA = 2, 512, 512, 0.1
HEAD = (
    "| shape | target | system | peak GB | of plain | temporary GB | left GB | done / needed "
    "| accessed GB | sent GB | of the ring | collectives | attention | compiled in s |\n"
    + "|---" * 14
    + "|"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A step of one system at one shape on one target.

    - `plan`: what it needs, or why XLA refuses to compile it.
    - `least`: bytes that a device sends at least.
    """

    shape: str
    target: str
    system: str
    plan: sharding.Plan | str
    least: float


def ours(optimizer: optax.GradientTransformation):
    """The step of this library."""
    return dpx.make_step(losses.dpo, optimizer, compute_dtype=jnp.bfloat16)


def plain(optimizer: optax.GradientTransformation):
    """The step of `peers/large_plain_jax.py`, with the arguments of `ours`."""

    def step(policy, opt_state, batch, reference):
        prompt = batch.prompt.ids
        rows = jnp.concatenate(
            [jnp.concatenate([prompt, x.ids], axis=1) for x in (batch.chosen, batch.rejected)]
        )
        width = prompt.shape[1]

        def loss(policy):
            expected = jax.lax.stop_gradient(log_probs(reference, rows, width))
            return dpo(log_probs(policy, rows, width), expected, BETA)

        value, gradient = eqx.filter_value_and_grad(loss)(policy)
        arrays = eqx.filter(policy, eqx.is_inexact_array)
        updates, opt_state = optimizer.update(gradient, opt_state, arrays)
        return eqx.apply_updates(policy, updates), opt_state, value

    return step


SYSTEMS = {"ours": ours, "plain": plain}


def compiled(shape: str, target: str, system: str, lengths: Sequence[int], remat: bool) -> Row:
    """The row of a step; `ImportError` if the compiler for the target is not installed."""
    config = dataclasses.replace(models.read_config(ALL_SHAPES[shape]), remat=remat)
    policy = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
    optimizer = optax.adamw(1e-6, weight_decay=0.01)
    opt_state = eqx.filter_eval_shape(
        lambda policy: optimizer.init(eqx.filter(policy, eqx.is_inexact_array)), policy
    )
    devices = len(find_target(target).devices)
    try:
        found = sharding.plan(
            SYSTEMS[system](optimizer),
            policy,
            opt_state,
            batch_of(PAIRS_OF_A_DEVICE * devices, *lengths),
            policy,
            target=target,
            mesh=f"fsdp={devices}",
        )
    except TooLargeError as error:
        found = str(error)
    return Row(shape, target, system, found, least_sent(policy, devices))


def least_sent(policy: models.Transformer, devices: int) -> float:
    """The bytes that a device sends at least, in a ring.

    All parameters are gathered three times, for the forward passes of policy and reference and for
    the backward pass, and their gradient is scattered once. All are in bfloat16.
    """
    arrays = jax.tree.leaves(eqx.filter(policy, lambda x: isinstance(x, jax.ShapeDtypeStruct)))
    return 4 * 2 * sum(x.size for x in arrays) * (devices - 1) / devices


def batch_of(pairs: int, prompt: int, completion: int) -> dpx.PreferenceBatch:
    """Pairs without padding."""

    def tokens(length):
        return dpx.Tokens(np.zeros((pairs, length), np.int32), np.ones((pairs, length), bool))

    return dpx.PreferenceBatch(tokens(prompt), tokens(completion), tokens(completion))


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """All rows, each when it is compiled; targets that cannot be compiled for are named."""
    for target in args.targets:
        for shape in args.shapes:
            try:
                for system in SYSTEMS:
                    yield compiled(shape, target, system, args.lengths, not args.no_remat)
            except ImportError as error:
                print(f"Not compiled for {target}: {error}", flush=True)
                break


def line(row: Row, plain_peak: int | None) -> str:
    """A line of the table."""
    plan = row.plan
    if isinstance(plan, str):
        return f"| {row.shape} | {row.target} | {row.system} | not compiled: {plan} |"
    cells = (
        row.shape,
        row.target,
        row.system,
        in_gb(plan.peak),
        f"{plan.peak / plain_peak:.2f}" if plain_peak else "",
        in_gb(plan.temporaries),
        in_gb(plan.capacity - plan.peak),
        f"{plan.flops_done / plan.flops_needed:.2f}",
        in_gb(plan.bytes_accessed),
        in_gb(plan.collective_bytes),
        f"{plan.collective_bytes / row.least:.2f}" if row.least else "",
        str(plan.collectives),
        plan.attention,
        f"{plan.compile_seconds:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def in_gb(number: int) -> str:
    """Three digits, and all digits before the point."""
    gigabytes = number / 1e9
    return f"{gigabytes:.3g}" if abs(gigabytes) < 100 else f"{gigabytes:.0f}"


def table(rows: Sequence[Row]) -> str:
    """The table, with each peak over that of plain JAX, if that could be compiled."""
    peaks = {
        (row.shape, row.target): row.plan.peak
        for row in rows
        if row.system == "plain" and isinstance(row.plan, sharding.Plan)
    }
    return "\n".join([HEAD, *(line(row, peaks.get((row.shape, row.target))) for row in rows)])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The settings; those of `--quick` are tiny."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", choices=ALL_SHAPES, default=list(COMPARED))
    parser.add_argument("--lengths", nargs=2, type=int, default=[PROMPT, COMPLETION])
    parser.add_argument("--no-remat", action="store_true")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    if args.quick:
        args.targets, args.shapes, args.lengths = ["cpu"], ["tiny-qwen3"], [6, 5]
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles everything, and prints a line for each program and then the table."""
    rows = []
    for row in rows_of(parse(arguments)):
        print(f"{row.shape} on {row.target}, {row.system}:\n{row.plan}", flush=True)
        rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
