"""Calls that a type checker must accept. `test_types.py` has pyright read them; nothing runs."""

from functools import partial

import equinox as eqx
import jax.numpy as jnp
import optax

import dpo_eqx as dpx
from dpo_eqx import losses


def squared(policy: dpx.PairLogProbs, reference: dpx.PairLogProbs | None) -> dpx.PairLoss:
    margin = jnp.asarray(policy.chosen) - jnp.asarray(policy.rejected)
    return dpx.PairLoss(margin**2, margin, margin)


def check(policy: eqx.Module, batch: dpx.PreferenceBatch, unpaired: dpx.UnpairedBatch) -> None:
    optimizer = optax.adam(1e-3)
    state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    bound = partial(losses.dpo, beta=0.1)
    for loss in (losses.dpo, bound, squared, losses.odpo, losses.wpo(losses.dpo)):
        step = dpx.make_step(loss, optimizer, microbatches=2, score=dpx.score_pairs)
        policy, state, metrics = step(policy, state, batch, policy, key=None)
        print(metrics["loss"] + 1)
        gradients, metrics = dpx.make_grad(loss)(policy, batch)
        print(gradients, metrics["grad_norm"])
    dpx.make_step(losses.kto, optimizer, score=dpx.score_unpaired)(policy, state, unpaired)
    dpx.make_step(losses.dpo, optimizer, score=dpx.ld_score(0.5))
    evaluate: dpx.Evaluate = dpx.make_eval(
        losses.dpo, metrics=lambda *given: {**dpx.default_metrics(*given), "one": jnp.ones(2)}
    )
    means = (evaluate(policy, batch) + evaluate(policy, batch, policy)).mean()
    print(means["loss"])
