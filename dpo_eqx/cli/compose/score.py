"""From settings to the score of a run, with its metrics, and what the mean of the loss runs over.

`loss.py` makes the loss.
"""

import functools
from typing import Literal

from ... import models
from ..._head.statistics import NAMES
from ..._scoring.packed import score_packed, score_packed_unpaired
from ..._scoring.score import ld_score, score_pairs, score_unpaired
from ...data._records.records import Form
from ...protocols import Score
from ..settings.settings import Settings


def compose_score(form: Form, settings: Settings, *, packed: bool) -> Score:
    """The score for records of `form`, with the metrics of tokens that the settings ask for.

    **Arguments:**

    - `packed`: whether batches hold packed rows.
    """
    if settings.reward_head:
        return models.score_rewards
    if settings.ld_alpha is not None:
        return ld_score(settings.ld_alpha)
    pairs, single = (
        (score_packed, score_packed_unpaired) if packed else (score_pairs, score_unpaired)
    )
    score = single if form.unpaired else pairs
    score = functools.partial(score, confidence=True) if settings.wpo else score
    # `num_tokens` is none of them: it comes from the batch alone.
    metrics = tuple(name for name in settings.metrics if name in NAMES)
    if _is_supervised(form, settings) and "accuracy" not in metrics:
        # It is to demonstrations what the accuracy of rewards is to preferences.
        metrics += ("accuracy",)
    return functools.partial(score, metrics=metrics) if metrics else score


def check_weights(form: Form, settings: Settings) -> None:
    """Raises `ValueError` if the data do not have what `--ld-alpha` and `--wpo` need."""
    for name, is_given in (("ld-alpha", settings.ld_alpha is not None), ("wpo", settings.wpo)):
        if is_given and form.unpaired:
            raise ValueError(f"`--{name}` is for pairs; the data are {form}. Leave it out.")
    stored = [name for name in form.numbers if name.startswith("reference_")]
    if settings.ld_alpha is not None and stored:
        raise ValueError(
            f"`--ld-alpha` weighs the tokens of the reference, and the data give it as the sums "
            f"{', '.join(stored)}. Leave these columns out by `--columns`, or leave out "
            "`--ld-alpha`."
        )


def average_of(form: Form, settings: Settings) -> Literal["rows", "tokens"]:
    """What a mean loss runs over: the tokens of the batch in supervised training, else its rows."""
    return (settings.average or "tokens") if _is_supervised(form, settings) else "rows"


def _is_supervised(form: Form, settings: Settings) -> bool:
    """Whether the run learns to write completions, rather than preferences."""
    return form.unpaired and settings.loss == ("sft",)
