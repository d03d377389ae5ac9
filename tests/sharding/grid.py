"""Steps of a small decoder by any road over any mesh, and how far they are from one device's.

Float64 and SGD: Adam hides a gradient that is eight times too large.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import data, losses, models, sharding

from ..policies import arrays, random_batch, statics

PAIRS = 16
SGD = optax.sgd(0.5)
CONFIG = models.Config(vocab=16, width=16, layers=2, heads=8, key_heads=8, feed_forward=32)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is stepped: the loss, into how many parts, with which reference, what of the policy."""

    loss: Callable[..., Any] = losses.dpo
    microbatches: int = 1
    precomputed: bool = False
    lora: bool = False
    packed: bool = False
    vocab: int = CONFIG.vocab
    remat: bool = False


VARIANTS = {
    "plain": Variant(),
    "coupled": Variant(losses.aot),
    "microbatches": Variant(microbatches=2),
    "coupled in microbatches": Variant(losses.aot, microbatches=2),
    "precomputed": Variant(precomputed=True),
    "LoRA": Variant(lora=True),
    "packed": Variant(microbatches=2, packed=True),
    # Hidden states are gathered over `fsdp` in place of the unembedding.
    "fewer tokens than the vocabulary": Variant(vocab=128),
    # What layers keep is split over `tensor` by its tokens.
    "recomputed layers": Variant(remat=True),
}


def wide(tree):
    """In float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, tree)


@functools.cache
def problem(variant: Variant):
    """The policy, a ragged batch of unequal weights, the reference, and options of the step."""
    config = dataclasses.replace(CONFIG, vocab=variant.vocab, remat=variant.remat)
    policy, reference = (
        wide(models.Transformer(config, key=jax.random.key(seed))) for seed in (0, 1)
    )
    weight = np.random.default_rng(0).uniform(0.5, 2, PAIRS)
    weight[13:] = 0  # the last batch of an epoch, filled up
    weight[4:6] = 0  # a device without any
    # A row of 16 tokens can be split over any mesh, one of 10 over some.
    widths = {"prompt": 6, "completion": 5} if variant.remat else {"prompt": 4, "completion": 3}
    batch = random_batch(pairs=PAIRS, weight=weight, **widths)
    options: dict[str, Any] = {"microbatches": variant.microbatches}
    if variant.lora:
        policy = models.add_lora(policy, rank=2, key=jax.random.key(2))
        adapters, base = eqx.partition(policy, models.lora_filter(policy))
        # Not zero, so that both matrices have a gradient.
        policy = wide(eqx.combine(jax.tree.map(lambda x: x + 0.1, adapters), base))
        reference = None
        options |= {"trainable": models.lora_filter(policy), "reference_of": models.without_lora}
    if variant.packed:
        batch = packed_batch(np.random.default_rng(0))
        options["score"] = dpx.score_packed
    if variant.precomputed:
        given = eqx.filter_jit(dpx.precompute_reference)(reference, batch)
        batch, reference = dataclasses.replace(batch, reference=given), None
    return policy, batch, reference, options


def packed_batch(rng):
    """As many rows as there are pairs elsewhere, of up to three pairs of unequal weight."""

    def row():
        # Not of one token, which may be the same: of a tie rounding says which side is above.
        prompt, chosen, rejected = (rng.integers(0, 16, n).tolist() for n in rng.integers(2, 5, 3))
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        return {**ids, "weight": rng.uniform(0.5, 2)}

    rows = [row() for _ in range(36)]
    return data.pack(rows, 24, multiple_of=PAIRS, dtype=np.float64)


def alone(variant: Variant):
    """Parameters and metrics after a step on one device."""
    policy, batch, reference, options = problem(variant)
    # Microbatches change nothing, so the plain step is what they are held against.
    return _whole(_jitted(variant.loss, **{**options, "microbatches": 1}), policy, batch, reference)


def automatic(variant: Variant, mesh):
    """The same, jitted on sharded inputs."""
    policy, batch, reference, options = problem(variant)
    policy, reference = sharding.shard_policy((policy, reference), mesh)
    step = _jitted(variant.loss, **options)
    return _whole(step, policy, sharding.shard_batch(batch, mesh), reference)


def by_shard_map(variant: Variant, mesh):
    """The same, the step mapped over the axes of the rows."""
    policy, batch, reference, options = problem(variant)
    step = dpx.make_step(variant.loss, SGD, axis_name=("data", "fsdp"), **options)
    mapped = jax.shard_map(
        _on_arrays(step, policy, reference),
        mesh=mesh,
        in_specs=(P(), P(("data", "fsdp")), P()),
        out_specs=P(),
    )
    return jax.jit(mapped)(arrays(policy), batch, arrays(reference))


def by_pmap(variant: Variant, mesh):
    """The same, by `pmap`."""
    policy, batch, reference, options = problem(variant)
    step = dpx.make_step(variant.loss, SGD, axis_name="data", **options)
    mapped = jax.pmap(
        _on_arrays(step, policy, reference), axis_name="data", in_axes=(None, 0, None)
    )
    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    results = mapped(arrays(policy), split, arrays(reference))
    return jax.tree.map(lambda x: x[3], results)


ROADS = {"filter_jit": automatic, "shard_map": by_shard_map, "pmap": by_pmap}


def deviation(got, want) -> float:
    """The greatest difference of all arrays, relative to 1 + |value|."""
    leaves = zip(jax.tree.leaves(arrays(got)), jax.tree.leaves(arrays(want)), strict=True)
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in leaves]
    return max(float((np.abs(x - y) / (1 + np.abs(y))).max()) for x, y in pairs)


def _jitted(loss, **options):
    return eqx.filter_jit(dpx.make_step(loss, SGD, **options))


def _whole(step, policy, batch, reference):
    """Parameters and metrics of a step with the state of SGD, which is empty."""
    policy, _, metrics = step(policy, SGD.init(arrays(policy)), batch, reference)
    return arrays(policy), metrics


def _on_arrays(step, policy, reference):
    """The step as raw transformations carry it: arrays only."""

    def on_device(params, batch, reference_params):
        here = eqx.combine(params, statics(policy))
        beside = eqx.combine(reference_params, statics(reference))
        return _whole(step, here, batch, beside)

    return on_device
