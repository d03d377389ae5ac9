"""Training from the reference, on one batch or on drawn ones. The losses are the library's."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import optax
from jaxtyping import PRNGKeyArray

import dpo_eqx as dpx

Policy = TypeVar("Policy")


def from_reference(
    loss: dpx.Loss, reference: Policy, batch, *, score: dpx.Score, rate: float, steps: int
) -> Policy:
    """The policy after steps of Adam on the whole batch, with a rate that falls as a cosine.

    All leaves of `reference` are arrays. Call it under `jit`; `vmap` maps it over data, over
    hyper-parameters of the loss, or over both.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    step = dpx.make_step(loss, optimizer, score=score)
    known = dpx.precompute_reference(reference, batch, score=score)
    batch = dataclasses.replace(batch, reference=known)

    def one_step(state, _):
        policy, opt_state, _ = step(state[0], state[1], batch)
        return (policy, opt_state), None

    start = reference, optimizer.init(eqx.filter(reference, eqx.is_array))
    return jax.lax.scan(one_step, start, length=steps)[0][0]


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
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    step = dpx.make_step(loss, optimizer, score=score)
    params, static = eqx.partition(reference, eqx.is_array)

    def one_step(state, key):
        policy, opt_state, _ = step(eqx.combine(state[0], static), state[1], draw(key), reference)
        return (eqx.filter(policy, eqx.is_array), opt_state), None

    start = params, optimizer.init(params)
    trained, _ = jax.lax.scan(one_step, start, jax.random.split(key, steps))
    return eqx.combine(trained[0], static)
