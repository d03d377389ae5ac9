"""The loop: steps, evaluations, checkpoints, until the end or a signal.

What it calls is composed in `cli/commands/train.py`; it decides only when.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PyTree

from ... import data
from ..._training.reference import sync_reference
from ..._training.step import Step
from ..settings.settings import Settings
from .checkpoints import Checkpoints
from .devices import put_batch
from .late_metrics import TOKENS, Lines, Write, tokens_of
from .signals import Stop
from .state import State, to_save

Advance = Callable[[State, Any, int], tuple[State, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a loop needs, and does not change.

    - `settings`; `steps`: the number of the last step.
    - `advance`: one step; see `make_advance`.
    - `evaluate`: the metrics of a state on the held-out data, `None` where there is none.
    - `batches`: to train on, at the first of them.
    - `checkpoints`; `trainable`: the filter of what they hold of the policy.
    - `rates`: the learning rate of each step.
    - `finish`: makes the policy to be written of the one that was trained.
    """

    settings: Settings
    steps: int
    advance: Advance
    evaluate: Callable[[State], dict[str, float]] | None
    batches: data.Batches
    checkpoints: Checkpoints
    trainable: PyTree
    rates: Float[np.ndarray, " steps"]
    finish: Callable[[PyTree], PyTree]


def make_advance(step: Step, *, dropout: bool, mesh: Mesh | None = None) -> Advance:
    """A jitted step on a `State`, which is used up, and on this process's part of a batch."""

    # Policy and optimiser are updated in place; what is `frozen` is kept.
    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        batch, reference, key, number = frozen
        key = jax.random.fold_in(key, number) if dropout else None
        policy, opt_state, metrics = step(policy, opt_state, batch, reference, key=key)
        return policy, opt_state, {**metrics, TOKENS: tokens_of(batch)}

    def advance(state: State, batch: Any, number: int) -> tuple[State, dict[str, Any]]:
        frozen = put_batch(batch, mesh), state.reference, state.key, np.uint32(number)
        policy, opt_state, metrics = train(frozen, state.policy, state.opt_state)
        return State(policy, opt_state, state.reference, state.key), metrics

    return advance


def loop(
    run: Run, state: State, start: int, *, write: Write, write_evaluation: Write, stop: Stop
) -> tuple[State, int]:
    """Goes from the step after `start` to the last one, or to the one that a signal made the last.

    The state at the end is in a checkpoint. A line of metrics is written before the checkpoint
    that holds its step.

    **Returns:**

    The state, and the number of its step.
    """
    settings = run.settings
    lines = Lines(write, run.rates)
    step = start

    def evaluate() -> None:
        if run.evaluate is not None:
            write_evaluation(step, run.evaluate(state))

    if start == 0:
        evaluate()
    while step < run.steps and not stop.before(step + 1):
        step += 1
        began = time.perf_counter()
        batch = next(run.batches)
        state, metrics = run.advance(state, batch, step)
        lines.add(step, metrics, began)
        if is_due(settings.sync_reference_every, step):
            state = synchronised(state, settings.sync_reference_alpha)
        if is_due(settings.eval_every, step) or step == run.steps:
            lines.flush()
            evaluate()
        if is_due(settings.save_every, step):
            lines.flush()
            save(run, state, step)
    lines.flush()
    if step:
        save(run, state, step)
    return state, step


def save(run: Run, state: State, step: int) -> None:
    """Writes a checkpoint of the state after `step`, and of the position in the data."""
    moving = run.settings.sync_reference_every > 0
    kept = to_save(state, run.trainable, moving_reference=moving)
    run.checkpoints.save(step, kept, run.batches.get_state())


@eqx.filter_jit
def synchronised(state: State, alpha: float) -> State:
    """The state with its reference moved towards the policy."""
    moved = sync_reference(state.reference, state.policy, alpha)
    return eqx.tree_at(lambda s: s.reference, state, moved)


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps happens at this one; 0 is never."""
    return every > 0 and step % every == 0
