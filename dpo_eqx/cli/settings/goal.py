"""The words of `--keep-best`: a metric of the evaluations, and whether its best value is the least.

`run/best.py` compares the values.
"""

from typing import NamedTuple

from .settings import Settings
from .sources import held_out_of

# Only the user knows it of other metrics, such as the log-probability of the rejected completions.
_MAXIMISED = {
    "loss": False,
    "rewards/accuracies": True,
    "rewards/margins": True,
    "mean_token_accuracy": True,
}


class Goal(NamedTuple):
    """A metric by its name in `eval.jsonl`, and whether larger values are better."""

    metric: str
    maximise: bool


def goal_of(settings: Settings) -> Goal | None:
    """The goal that `--keep-best` names; `None` without it.

    **Raises:**

    `ValueError` if it names no held-out set where sets have names, or if nobody has said whether
    the metric is to be minimised or maximised.
    """
    if settings.keep_best is None:
        return None
    direction, colon, name = settings.keep_best.partition(":")
    is_given = bool(colon) and direction in ("min", "max")
    name = name if is_given else settings.keep_best
    sets = [held_out.name for held_out in held_out_of(settings.eval_data)]
    # `eval/` is what our files have before a metric, and `eval_` what users of TRL write.
    without = name.removeprefix("eval/").removeprefix("eval_")
    held_out, metric = _split(name if "eval" in sets else without, sets)
    if not is_given and metric not in _MAXIMISED:
        raise ValueError(
            f"`--keep-best {name}` must say whether the metric is to be minimised or maximised, "
            f"which is only known for {', '.join(_MAXIMISED)}. Give `--keep-best min:{name}` or "
            f"`max:{name}`."
        )
    maximise = direction == "max" if is_given else _MAXIMISED[metric]
    return Goal(prefix(held_out) + metric, maximise)


def prefix(held_out: str) -> str:
    """What stands before the names of the metrics of a held-out set, such as `eval/helpful/`."""
    return f"eval/{held_out}/" if held_out else "eval/"


def _split(name: str, sets: list[str]) -> tuple[str, str]:
    """The held-out set, and the metric of it."""
    if not any(sets):
        return "", name
    held_out, _, metric = name.partition("/")
    if held_out not in sets or not metric:
        examples = " or ".join(f"{one}/loss" for one in sets)
        raise ValueError(
            "`--keep-best` must begin with the name of a held-out set if the sets have names; got "
            f"{name}. Give a metric such as {examples}."
        )
    return held_out, metric
