"""The loop: steps, evaluations and checkpoints, until the end or a signal.

`commands/train.py` composes the functions that the loop calls; the loop only decides when.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PyTree

from ... import data
from ..._training.reference import snapshot, sync_reference
from ..._training.step import Step
from ..settings.goal import Goal
from ..settings.settings import Settings
from .best import Best, updated
from .checkpoints import Checkpoints
from .devices import put_batch
from .late_metrics import NUM_TOKENS, TOKENS, Lines, sides_of, tokens_of, tokens_read
from .offload import fetched, returned
from .signals import Stop
from .sinks import Numbers, Samples, SampleSink, Sink
from .state import State, averaged, evaluated, restored, to_save

Advance = Callable[[State, Any, int], tuple[State, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Run:
    """The constants of a run, which the loop needs and does not replace.

    - `settings`: the settings of the run.
    - `steps`: the number of the last step.
    - `advance`: a function that takes one step; see `make_advance`.
    - `evaluate`: a function from a state to the name of each held-out set and the metrics on it;
        `None` without held-out data.
    - `sample`: a function from a state to answers to some prompts; `None` without
        `--sample-every`.
    - `batches`: the batches to train on, at the first batch.
    - `checkpoints`: the checkpoints of the run.
    - `trainable`: the filter of the policy's trained parameters, which checkpoints hold.
    - `rates`: the learning rate of each step.
    - `restart`: a function that returns the policy as it was before the first step.
    - `finish`: a function from the trained policy to the policy that is saved.
    - `goal`: which evaluation is the best; `None` without `--keep-best`.
    - `chat_template`: the text of the chat template that is saved with it; `None` for the
        tokenizer's own.
    - `tokens_before`: the number of tokens read before this start of the run, if it is a metric.
    """

    settings: Settings
    steps: int
    advance: Advance
    evaluate: Callable[[State], Iterable[tuple[str, Numbers]]] | None
    sample: Callable[[State], Samples] | None
    batches: data.Batches
    checkpoints: Checkpoints
    trainable: PyTree
    rates: Float[np.ndarray, " steps"]
    restart: Callable[[], PyTree]
    finish: Callable[[PyTree], PyTree]
    goal: Goal | None = None
    chat_template: str | None = None
    tokens_before: float | None = None


class Place(NamedTuple):
    """Where a run is: its state, the number of steps that it has taken, and the best evaluation."""

    state: State
    step: int
    best: Best


def make_advance(
    step: Step,
    *,
    dropout: bool,
    mesh: Mesh | None = None,
    offload: Mapping[str, bool] | None = None,
) -> Advance:
    """A jitted step on a `State` and on this process's part of a batch; the state is donated.

    **Arguments:**

    - `step`: from `make_step`.
    - `dropout`: whether the step draws random numbers.
    - `mesh`: the mesh of the run, if any.
    - `offload`: what `offloaded` has put into the memory of the host. The step fetches it, and
        returns the optimiser's state to that memory.
    """
    # Restored arrays are in host memory, but their types do not say so while a step is traced.
    fetch_reference, fetch_optimizer = (
        bool((offload or {}).get(name)) for name in ("reference", "optimizer")
    )

    # Policy and optimiser are updated in place. The batch, reference and key are used again.
    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        batch, reference, key, number = frozen
        key = jax.random.fold_in(key, number) if dropout else None
        reference = fetched(reference) if fetch_reference else reference
        opt_state = fetched(opt_state) if fetch_optimizer else opt_state
        policy, opt_state, metrics = step(policy, opt_state, batch, reference, key=key)
        opt_state = returned(opt_state) if fetch_optimizer else opt_state
        counts = {TOKENS: tokens_of(batch), NUM_TOKENS: tokens_read(batch), **sides_of(batch)}
        return policy, opt_state, {**metrics, **counts}

    def advance(state: State, batch: Any, number: int) -> tuple[State, dict[str, Any]]:
        frozen = put_batch(batch, mesh), state.reference, state.key, np.uint32(number)
        policy, opt_state, metrics = train(frozen, state.policy, state.opt_state)
        return State(policy, opt_state, state.reference, state.key), metrics

    return advance


def loop(
    run: Run,
    start: Place,
    *,
    write: Sink,
    write_evaluation: Callable[[int, str, Numbers], None],
    write_samples: SampleSink,
    stop: Stop,
) -> Place:
    """Takes the steps after `start`, up to the end of the run or a signal to stop.

    The final state is saved in a checkpoint. A line of metrics is written before the checkpoint
    that holds its step.

    **Arguments:**

    - `run`: the constants of the run.
    - `start`: where the run begins.
    - `write`, `write_samples`: functions of a step and its metrics, or its answers to prompts.
    - `write_evaluation`: a function of a step, the name of a held-out set, and the metrics on it.
    - `stop`: whether a signal asked to stop.

    **Returns:**

    Where the run ends.
    """
    settings = run.settings
    lines = Lines(write, run.rates, run.tokens_before)
    state, step, best = start

    def best_now() -> Best:
        return evaluate(run, Place(state, step, best), write_evaluation)

    if step == 0 and settings.eval_at_start:
        best = best_now()
    while not is_over(run, step, best) and not stop.before(step + 1):
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
            best = best_now()
        if run.sample is not None and is_due(settings.sample_every, step):
            lines.flush()
            write_samples(step, run.sample(evaluated(state)))
        # A continued run starts at the latest checkpoint, so that of the best is never after it.
        if is_due(settings.save_every, step) or best.step == step:
            lines.flush()
            save(run, Place(state, step, best))
    lines.flush()
    if step:
        save(run, Place(state, step, best))
    return Place(state, step, best)


def is_over(run: Run, step: int, best: Best) -> bool:
    """Whether the run ends after `step`: at its last step, or by `--early-stop`."""
    patience = run.settings.early_stop
    return step >= run.steps or (patience is not None and best.since >= patience)


def evaluate(run: Run, place: Place, write: Callable[[int, str, Numbers], None]) -> Best:
    """Evaluates the state on each held-out set, and returns the best evaluation so far."""
    numbers: dict[str, float] = {}
    for name, metrics in () if run.evaluate is None else run.evaluate(place.state):
        write(place.step, name, metrics)
        numbers |= metrics
    if run.evaluate is None or run.goal is None:
        return place.best
    return updated(place.best, run.goal, place.step, numbers)


def save(run: Run, place: Place) -> None:
    """Writes a checkpoint of the state, the position in the data, and the best evaluation."""
    arrays = arrays_of(run, place.state)
    position = run.batches.get_state()
    if run.goal is not None:
        position |= {"best": dataclasses.asdict(place.best)}
    run.checkpoints.save(place.step, arrays, position, best=place.best.step)


def restore(run: Run, state: State, step: int) -> Place:
    """The place after `step`, from its checkpoint; sets the position in the data.

    `state` gives the arrays that checkpoints do not hold.
    """
    saved, position = run.checkpoints.restore(step, arrays_of(run, state))
    best = Best(**position.pop("best", {}))
    run.batches.set_state(position)
    return Place(restored(state, saved), step, best)


def best_place(run: Run, place: Place) -> Place:
    """The place after the best evaluation; `place` itself without one. It deletes other arrays.

    The last state is in a checkpoint of its own, and two states may not fit into the memory.
    """
    state, step, best = place
    if best.step is None or best.step == step:
        return place
    arrays = arrays_of(run, state)
    for leaf in jax.tree.leaves([arrays[name] for name in ("policy", "optimizer", "reference")]):
        leaf.delete()
    if best.step:
        saved, _ = run.checkpoints.restore(best.step, arrays)
        return Place(restored(state, saved), best.step, best)
    policy = run.restart()
    reference = snapshot(policy) if arrays["reference"] else state.reference
    return Place(State(policy, None, reference, state.key), 0, best)


def arrays_of(run: Run, state: State) -> dict[str, PyTree]:
    """The arrays of `state` that a checkpoint of the run holds."""
    is_moving = run.settings.sync_reference_every > 0
    return to_save(state, run.trainable, moving_reference=is_moving)


_moved = eqx.filter_jit(sync_reference)


def synchronised(state: State, alpha: float) -> State:
    """The state with its reference moved towards the policy."""
    moved = _moved(state.reference, averaged(state), alpha)
    return eqx.tree_at(lambda s: s.reference, state, moved)


def is_due(every: int, step: int) -> bool:
    """Whether an action with the period `every`, in steps, is due at this step; 0 is never."""
    return every > 0 and step % every == 0
