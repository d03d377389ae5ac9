"""The best of the evaluations so far. Checkpoints hold it, so that a continued run remembers it.

`settings/goal.py` says what is best, and `loop.py` evaluates.
"""

import dataclasses
import math

from ..settings.goal import Goal
from .sinks import Numbers


@dataclasses.dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far.

    - `step`: its number of steps; `None` if no evaluation had a finite value.
    - `value`: its value of the goal's metric.
    - `evaluations`: the number of all evaluations so far.
    - `since`: the number of evaluations in a row without a better value, up to now.
    """

    step: int | None = None
    value: float | None = None
    evaluations: int = 0
    since: int = 0


def updated(best: Best, goal: Goal, step: int, numbers: Numbers) -> Best:
    """The best after one more evaluation.

    The earlier of equal values stays the best, and a value that is not finite is never the best.
    There is no value if no held-out completion has the label that the metric is about.
    """
    value, count = numbers.get(goal.metric, math.nan), best.evaluations + 1
    if not _is_better(value, best.value, goal):
        return Best(best.step, best.value, count, best.since + 1)
    return Best(step, value, count)


def _is_better(value: float, than: float | None, goal: Goal) -> bool:
    if than is None or not math.isfinite(value):
        return math.isfinite(value)
    return value > than if goal.maximise else value < than


def in_words(best: Best, goal: Goal) -> str:
    """Which model is written, as a phrase."""
    count = _evaluations(best.evaluations)
    if best.step is None:
        return f"the model after the last step, since {goal.metric} was finite in none of {count}"
    when = f"after step {best.step}" if best.step else "before the first step"
    return f"the model {when}, the best of {count} by {goal.metric}: {best.value:.4g}"


def why_early(best: Best, goal: Goal, step: int) -> str:
    """Why a run ended after `step`, before its last step."""
    count = _evaluations(best.since)
    return f"stopped early after step {step}: {count} without a better {goal.metric}"


def _evaluations(count: int) -> str:
    return "1 evaluation" if count == 1 else f"{count} evaluations"
