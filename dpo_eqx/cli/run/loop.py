"""The loop: steps, evaluations and checkpoints, until the end or a signal.

`commands/train.py` composes the functions that the loop calls; the loop only decides when.
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
from .late_metrics import TOKENS, Lines, sides_of, tokens_of
from .signals import Stop
from .sinks import Sink
from .state import State, evaluated, to_save

Advance = Callable[[State, Any, int], tuple[State, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Run:
    """The constants of a run, which the loop needs and does not replace.

    - `settings`: the settings of the run.
    - `steps`: the number of the last step.
    - `advance`: a function that takes one step; see `make_advance`.
    - `evaluate`: a function from a state to its metrics on the held-out data; `None` without
        held-out data.
    - `batches`: the batches to train on, at the first batch.
    - `checkpoints`: the checkpoints of the run.
    - `trainable`: the filter of the policy's trained parameters, which checkpoints hold.
    - `rates`: the learning rate of each step.
    - `finish`: a function from the trained policy to the policy that is saved.
    - `chat_template`: the text of the chat template that is saved with it; `None` for the
        tokenizer's own.
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
    chat_template: str | None = None


def make_advance(step: Step, *, dropout: bool, mesh: Mesh | None = None) -> Advance:
    """A jitted step on a `State` and on this process's part of a batch; the state is donated."""

    # Policy and optimiser are updated in place. The batch, reference and key are used again.
    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        batch, reference, key, number = frozen
        key = jax.random.fold_in(key, number) if dropout else None
        policy, opt_state, metrics = step(policy, opt_state, batch, reference, key=key)
        return policy, opt_state, {**metrics, TOKENS: tokens_of(batch), **sides_of(batch)}

    def advance(state: State, batch: Any, number: int) -> tuple[State, dict[str, Any]]:
        frozen = put_batch(batch, mesh), state.reference, state.key, np.uint32(number)
        policy, opt_state, metrics = train(frozen, state.policy, state.opt_state)
        return State(policy, opt_state, state.reference, state.key), metrics

    return advance


def loop(
    run: Run, state: State, start: int, *, write: Sink, write_evaluation: Sink, stop: Stop
) -> tuple[State, int]:
    """Takes the steps after `start`, up to the last step of the run or a signal to stop.

    The final state is saved in a checkpoint. A line of metrics is written before the checkpoint
    that holds its step.

    **Arguments:**

    - `run`: the constants of the run.
    - `state`: the state after step `start`.
    - `start`: the number of steps that the state has taken.
    - `write`: a function of a step and its metrics.
    - `write_evaluation`: a function of a step and its metrics on the held-out data.
    - `stop`: whether a signal asked to stop.

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
        # The metrics may not be computed yet. `lines` reads them one step late, so that the host
        # prepares the next batch while the device works.
        lines.add(step, metrics, began)
        if is_due(settings.sync_reference_every, step):
            state = synchronised(state, settings.sync_reference_alpha)
        # `flush` raises if the step's metrics are not finite, so it precedes every checkpoint.
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
    is_moving = run.settings.sync_reference_every > 0
    arrays = to_save(state, run.trainable, moving_reference=is_moving)
    run.checkpoints.save(step, arrays, run.batches.get_state())


@eqx.filter_jit
def synchronised(state: State, alpha: float) -> State:
    """The state with its reference moved towards the policy."""
    moved = sync_reference(state.reference, evaluated(state).policy, alpha)
    return eqx.tree_at(lambda s: s.reference, state, moved)


def is_due(every: int, step: int) -> bool:
    """Whether an action with the period `every`, in steps, is due at this step; 0 is never."""
    return every > 0 and step % every == 0
