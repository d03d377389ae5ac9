"""Several answers to one prompt, with scores: found in a record, and made into pairs.

`verdicts.py` knows two answers with a verdict, and `shapes.py` all other layouts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .turns import as_messages, is_messages, listed
from .values import found

PAIRS = ("best-worst", "all", "best-rest")

# Columns that hold the answers, the keys of an answer's text, and those of its score.
_ANSWERS = ("completions", "answers", "responses", "generations", "candidates", "outputs")
_ANSWERS += ("replies",)  # OpenAssistant, as `threads.py` makes them
_TEXTS = ("response", "answer", "text", "completion", "content", "output", "generation", "messages")
_SCORES = ("overall_score", "score", "pm_score", "rating", "reward")
_RANKS = ("rank", "ranking")


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer, as text or messages, and its score; `None` if it has none."""

    content: Any
    score: float | None


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Where the answers of a record and their scores are; `str` says it in words.

    **Arguments:**

    - `columns`: the columns that hold them.
    - `answers`: the answers of a record, from the record and its place.
    - `is_scale`: whether differences of scores mean something, unlike those of ranks.
    - `words`: the source of answers and scores in words.
    """

    columns: tuple[str, ...]
    answers: Callable[[Mapping[str, Any], str], list[Answer]]
    is_scale: bool
    words: str

    def __str__(self):
        return self.words


def ranking_of(record: Mapping[str, Any]) -> Ranking | None:
    """The ranking that `record` holds, if it holds one."""
    if "chosen" in record and "rejected" in record:
        return _several_rejected() if _are_answers(record["rejected"]) else None
    for column in _ANSWERS:
        answers = listed(record.get(column))
        if isinstance(answers, list) and answers:
            found_here = _of_mappings(column, answers) or _beside(column, answers, record)
            if found_here is not None:
                return found_here
    return None


def _of_mappings(column: str, answers: list[Any]) -> Ranking | None:
    """Answers such as `{"response": text, "overall_score": 8.5}`."""
    if not all(isinstance(answer, Mapping) for answer in answers):
        return None
    text = next((key for key in _TEXTS if key in answers[0]), None)
    score = next((key for key in (*_SCORES, *_RANKS) if key in answers[0]), None)
    if text is None or score is None:
        return None

    def read(record: Mapping[str, Any], where: str) -> list[Answer]:
        what = f"`{column}` in {where}"
        return [
            Answer(_content(a, text, what), _score(a.get(score), score, f"`{score}` of {what}"))
            for a in _list(record.get(column), what)
        ]

    words = f"answers from `{text}` of `{column}` by `{score}`"
    return Ranking((column,), read, score not in _RANKS, words)


def _beside(column: str, answers: list[Any], record: Mapping[str, Any]) -> Ranking | None:
    """Answers whose scores are a list in another column, such as `scores`."""
    names = (*_SCORES, *_RANKS)
    score = next(
        (c for n in names for c in (f"{n}s", n) if isinstance(listed(record.get(c)), list)), None
    )
    if score is None or not all(isinstance(a, str) or is_messages(a) for a in answers):
        return None

    def read(record: Mapping[str, Any], where: str) -> list[Answer]:
        what = f"`{score}` in {where}"
        contents = _list(record.get(column), f"`{column}` in {where}")
        scores = _list(record.get(score), what)
        if len(scores) != len(contents):
            raise ValueError(
                f"{what} must hold a number for each answer in `{column}`; got {len(scores)} "
                f"numbers for {len(contents)} answers."
            )
        name = score.removesuffix("s")
        pairs = zip(contents, scores, strict=True)
        return [Answer(as_messages(c), _score(s, name, what)) for c, s in pairs]

    is_scale = score.removesuffix("s") not in _RANKS
    return Ranking((column, score), read, is_scale, f"answers from `{column}` by `{score}`")


def _several_rejected() -> Ranking:
    """One chosen answer, and a list of rejected ones, which are equally bad."""

    def read(record: Mapping[str, Any], where: str) -> list[Answer]:
        rejected = record.get("rejected")
        if not isinstance(rejected, list) or not _are_answers(rejected):
            raise ValueError(
                f"`rejected` in {where} must be a list of answers like the other records'; got "
                f"{found(rejected)}."
            )
        chosen = Answer(as_messages(record.get("chosen")), 1.0)
        return [chosen, *(Answer(as_messages(answer), 0.0) for answer in rejected)]

    return Ranking(("chosen", "rejected"), read, False, "answers from `chosen` and each `rejected`")


def _are_answers(value: Any) -> bool:
    """Whether `value` is a list of answers, each of them text or a list of messages."""
    items = value if isinstance(value, list) else []
    return bool(items) and all(isinstance(item, str) or is_messages(item) for item in items)


def _content(answer: Any, text: str, what: str) -> Any:
    if not isinstance(answer, Mapping) or answer.get(text) is None:
        raise ValueError(f"{what} must hold answers with `{text}`; got {found(answer)}.")
    return as_messages(answer[text])


def _list(value: Any, what: str) -> list[Any]:
    value = listed(value)
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list like the other records'; got {found(value)}.")
    return value


def _score(value: Any, name: str, what: str) -> float | None:
    """The score as a number, greater if the answer is better; `None` if there is none."""
    if value is None or value in ("", "N/A"):
        return None
    number = as_number(value, what)
    return -number if name in _RANKS else number


def as_number(value: Any, what: str) -> float:
    """A finite number, also from text, else a `ValueError`."""
    try:
        number = math.nan if isinstance(value, bool | list | dict) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number; got {found(value)}.")
    return number


def pairs_of(scores: Sequence[float], how: str) -> Iterator[tuple[int, int]]:
    """The better and the worse answer of each pair, by number. Equal scores make no pair.

    **Arguments:**

    - `how`: `best-worst` pairs the best answer with the worst one, `best-rest` with every worse
        one, and `all` every two answers. The first of equal answers counts.
    """
    numbers = range(len(scores))
    best = max(numbers, key=scores.__getitem__, default=0)
    worst = min(numbers, key=scores.__getitem__, default=0)
    better = numbers if how == "all" else (best,)
    worse = (worst,) if how == "best-worst" else numbers
    for i in better[: len(scores)]:
        yield from ((i, j) for j in worse if scores[i] > scores[j])
