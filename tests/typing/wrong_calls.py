"""Calls that a type checker must refuse, on the lines that end with `# error`."""

import equinox as eqx
import jax.numpy as jnp
import optax

import dpo_eqx as dpx
from dpo_eqx import losses


def one_argument(policy: dpx.PairLogProbs) -> dpx.PairLoss:
    chosen = jnp.asarray(policy.chosen)
    return dpx.PairLoss(chosen, chosen, chosen)


def without_key(policy: eqx.Module, batch: dpx.PreferenceBatch) -> dpx.PairLogProbs:
    return dpx.score_pairs(policy, batch)


def check(policy: eqx.Module, batch: dpx.PreferenceBatch) -> None:
    optimizer = optax.adam(1e-3)
    state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    step = dpx.make_step(losses.dpo, optimizer)
    step(policy, state)  # error
    step(policy, state, batch, seed=0)  # error
    dpx.make_step(losses.dpo, optimizer, microbatch=2)  # error
    dpx.make_step(losses.dpo, optimizer, microbatches="2")  # error
    dpx.make_step(one_argument, optimizer)  # error
    dpx.make_grad(losses.dpo, score=without_key)  # error
    dpx.make_eval(losses.dpo)(policy, batch, key=None)  # error
    dpx.make_eval(losses.dpo)(policy, batch).maen()  # error
    dpx.make_grad(losses.dpo, metrics=lambda policy: {})  # error
