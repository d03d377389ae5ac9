"""The metrics of a state on the held-out sets, as exact means.

`make_eval` computes them for one batch, and `loop.py` decides when.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
from jax.sharding import Mesh

from ..compose.data import Prepared, make_batches
from ..settings.goal import Goal, goal_of, prefix
from ..settings.settings import Settings
from . import devices
from .late_metrics import SIDES, without_sides
from .sinks import Numbers
from .state import State, evaluated


def make_evaluate(
    evaluate: Any, sets: Sequence[Prepared], settings: Settings, mesh: Mesh | None
) -> Callable[[State], Iterator[tuple[str, Numbers]]] | None:
    """A function from a state to the name of each held-out set and the metrics on it, if any.

    **Arguments:**

    - `evaluate`: a jitted function of policy, batch and reference; see `make_eval`.
    - `sets`: the held-out sets.
    """

    def all_sets(state: State) -> Iterator[tuple[str, Numbers]]:
        for held_out in sets:
            yield held_out.name, evaluate_all(evaluate, held_out, settings, mesh, state)

    return all_sets if sets else None


def evaluate_all(
    evaluate: Any, held_out: Prepared, settings: Settings, mesh: Mesh | None, state: State
) -> dict[str, float]:
    """The metrics on a held-out set, as exact means over all of its rows."""
    state = evaluated(state)
    with make_batches(held_out, settings, training=False, **devices.parts(mesh)) as batches:
        placed = (devices.put_batch(batch, mesh) for batch in batches)
        parts = (evaluate(state.policy, batch, state.reference) for batch in placed)
        metrics = functools.reduce(operator.add, parts)
    absent = [side for side in SIDES if not metrics.counts[f"logps/{side}"] > 0]
    means = without_sides({n: float(value) for n, value in metrics.mean().items()}, absent)
    return {prefix(held_out.name) + name: value for name, value in means.items()}


def checked_goal(
    evaluate: Any, sets: Sequence[Prepared], settings: Settings, mesh: Mesh | None, state: State
) -> Goal | None:
    """The goal of `--keep-best`, after a check that evaluations have its metric.

    It traces an evaluation and computes nothing, so that the user knows before the first step.

    **Raises:**

    `ValueError` if there is no such metric.
    """
    goal = goal_of(settings)
    if goal is None:
        return None
    (held_out,) = (s for s in sets if goal.metric.startswith(prefix(s.name)))
    with make_batches(held_out, settings, training=False, **devices.parts(mesh)) as batches:
        batch = devices.put_batch(next(batches), mesh)
    means = eqx.filter_eval_shape(
        lambda *args: evaluate(*args).mean(), state.policy, batch, state.reference
    )
    names = [prefix(held_out.name) + name for name in means]
    if goal.metric not in names:
        words = ", ".join(name.removeprefix("eval/") for name in names)
        raise ValueError(
            "`--keep-best` must name a metric of the evaluations; got "
            f"{goal.metric.removeprefix('eval/')}. The metrics are {words}."
        )
    return goal
