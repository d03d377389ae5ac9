"""This library, used as in its README: with the user's own loop and donated buffers."""

from functools import partial

import equinox as eqx
import jax
import numpy as np
import optax

import dpo_eqx as dpx
from benchmarks.problem import Problem, token_ids
from benchmarks.turns import Turns
from benchmarks.workers import given_problem
from dpo_eqx import losses, models


def batch_of(problem: Problem) -> dpx.PreferenceBatch:
    """The pairs of the problem, without padding."""

    def tokens(ids: np.ndarray) -> dpx.Tokens:
        return dpx.Tokens(ids, np.ones(ids.shape, bool))

    return dpx.PreferenceBatch(**{name: tokens(ids) for name, ids in token_ids(problem).items()})


def training(problem: Problem, policy: models.Transformer, reference: models.Transformer):
    """The step that trains `policy` on the problem, and its arguments.

    **Returns:**

    The jitted step, `(frozen, policy, opt_state) -> (policy, opt_state, metrics)`, whose arguments
    except the first are donated; and these arguments.
    """
    optimizer = optax.adamw(problem.learning_rate, weight_decay=problem.weight_decay)
    loss = partial(losses.dpo, beta=problem.beta)
    step = dpx.make_step(loss, optimizer, microbatches=problem.microbatches)
    batch, frozen = batch_of(problem), reference
    if problem.precomputed:
        log_probs = eqx.filter_jit(dpx.precompute_reference)(reference, batch)
        batch = dpx.PreferenceBatch(batch.prompt, batch.chosen, batch.rejected, reference=log_probs)
        frozen = None

    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        batch, reference = frozen
        return step(policy, opt_state, batch, reference)

    opt_state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
    return train, ((batch, frozen), policy, opt_state)


def main() -> None:
    turns = Turns(version=f"JAX {jax.__version__}")
    problem, folder = given_problem()
    policy, reference = (models.load(folder / name) for name in ("policy", "reference"))
    train, (frozen, policy, opt_state) = training(problem, policy, reference)
    del reference
    turns.begin()
    going_on = True
    while going_on:
        policy, opt_state, metrics = train(frozen, policy, opt_state)
        going_on = turns.step_done(metrics["loss"])


if __name__ == "__main__":
    main()
