"""Training from the reference, on one batch or on several. The losses are the library's."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

import dpo_eqx as dpx
from dpo_eqx import data

Policy = TypeVar("Policy")
ROWS = 40  # in a batch of rows


def from_reference(
    loss: dpx.Loss, reference: Policy, batch, *, score: dpx.Score, rate: float, steps: int
) -> Policy:
    """The policy after steps of Adam on the whole batch, with a rate that falls as a cosine.

    All leaves of `reference` are arrays. Call it under `jit`; `vmap` maps it over data, over
    hyper-parameters of the loss, or over both.
    """
    known = dpx.precompute_reference(reference, batch, score=score)
    batch = dataclasses.replace(batch, reference=known)
    numbers = jnp.arange(steps)
    return _trained(loss, reference, lambda _: (batch,), numbers, score=score, rate=rate)


def on_batches(
    loss: dpx.Loss,
    reference: Policy,
    draw: Callable,
    key: PRNGKeyArray,
    *,
    score: dpx.Score,
    rate: float,
    steps: int,
) -> Policy:
    """The policy after steps of Adam on a batch each, `draw(key)`, with a rate as above.

    Leaves of `reference` that are not arrays stay as they are. Call it under `jit`.
    """
    keys = jax.random.split(key, steps)
    return _trained(loss, reference, lambda k: (draw(k), reference), keys, score=score, rate=rate)


def on_rows(
    loss: Callable, reference: Policy, *, rows, rate: float, epochs: int, seed: int
) -> Policy:
    """The policy after some epochs of Adam on rows of `data.tokenize`, with a rate as above."""
    optimizer, step = _compiled(loss, rate, epochs * -(-len(rows) // ROWS))
    policy, opt_state = reference, optimizer.init(eqx.filter(reference, eqx.is_inexact_array))
    for batch in data.batches(rows, batch_size=ROWS, seed=seed, epochs=epochs, buckets=1):
        policy, opt_state, _ = step(policy, opt_state, batch, reference)
    return policy


@functools.cache  # so that folds and seeds share a compiled step
def _compiled(loss: Callable, rate: float, steps: int):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    return optimizer, eqx.filter_jit(dpx.make_step(loss, optimizer))


def _trained(
    loss: dpx.Loss, start: Policy, inputs: Callable, over: Array, *, score: dpx.Score, rate: float
) -> Policy:
    """The policy after a step for each of `over`, of which `inputs` makes a batch, and a reference.

    Without a reference, the batch has its log-probabilities.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, len(over)))
    step = dpx.make_step(loss, optimizer, score=score)
    params, static = eqx.partition(start, eqx.is_array)

    def one_step(state, x):
        policy, opt_state, _ = step(eqx.combine(state[0], static), state[1], *inputs(x))
        return (eqx.filter(policy, eqx.is_array), opt_state), None

    trained, _ = jax.lax.scan(one_step, (params, optimizer.init(params)), over)
    return eqx.combine(trained[0], static)
