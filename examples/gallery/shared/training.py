"""Training on one batch from the reference, as most entries do it. The losses are the library's."""

import dataclasses
from typing import TypeVar

import equinox as eqx
import jax
import optax

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
