"""This library at the shape of a real model, computing in bfloat16."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpo_eqx as dpx
from benchmarks.large import SHAPES, Case, rows_of
from benchmarks.turns import Turns
from benchmarks.workers import given
from dpo_eqx import losses, models


def device_peak() -> float:
    """The peak memory of the accelerator so far, in GB; 0 if it does not report it."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use", 0) / 1e9


def policy_of(case: Case) -> models.Transformer:
    """The policy with random weights in float32, made on the device."""
    config = models.read_config(SHAPES[case.shape])
    how_it_runs = {name: getattr(case, name) for name in ("remat", "fused", "unroll")}
    config = dataclasses.replace(config, **how_it_runs)
    return eqx.filter_jit(models.Transformer)(config, key=jax.random.key(0))


def batch_of(case: Case) -> dpx.PreferenceBatch:
    """The pairs, without padding."""
    rows = jnp.asarray(rows_of(case))
    parts = rows[: case.pairs, : case.prompt], *jnp.split(rows[:, case.prompt :], 2)
    return dpx.PreferenceBatch(*(dpx.Tokens(ids, np.ones(ids.shape, bool)) for ids in parts))


def main() -> None:
    turns = Turns(version=f"JAX {jax.__version__}", device_peak=device_peak)
    case, _ = given(Case)
    optimizer = optax.adamw(case.learning_rate, weight_decay=case.weight_decay)
    settings = {"microbatches": case.microbatches, "compute_dtype": jnp.bfloat16}
    step = dpx.make_step(partial(losses.dpo, beta=case.beta), optimizer, **settings)

    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        batch, reference = frozen
        return step(policy, opt_state, batch, reference)

    policy = policy_of(case)
    frozen = batch_of(case), dpx.snapshot(policy)
    opt_state, going_on = optimizer.init(eqx.filter(policy, eqx.is_inexact_array)), True
    turns.begin()
    while going_on:
        policy, opt_state, metrics = train(frozen, policy, opt_state)
        going_on = turns.step_done(metrics["loss"])


if __name__ == "__main__":
    main()
