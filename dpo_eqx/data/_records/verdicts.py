"""Two answers and a verdict on them: a number, the name of the better answer, or two scores.

The verdict becomes two scores, so `rankings.py` makes the pair.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from .rankings import Answer, Ranking, as_number
from .turns import as_messages, from_json_list
from .values import found, ticked

_ANSWER = re.compile(
    r"(response|answer|output|completion|conversation|human_ref|generation|summary|reply)"
    r"(_?)([012abAB])"
)
_SIDES = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))
# Below zero if the first answer is better: HelpSteer2 and HelpSteer3.
_SIGNED = ("preference_strength", "overall_preference")
# They name the better answer: SafeRLHF, AlpacaFarm, Chatbot Arena.
_NAMED = ("better_response_id", "winner", "preference", "preferred", "choice", "label")
_SCORED = ("score", "rating", "reward")
_TIE = re.compile(r"tie\b.*|both.*|draw|equal|neither|none", re.IGNORECASE)

Scores = tuple[float, float] | None


def verdict_of(record: Mapping[str, Any]) -> Ranking | None:
    """The two answers and the verdict that `record` holds, if it holds them."""
    names = [name for name in record if _ANSWER.fullmatch(str(name))]
    for sides in _SIDES:
        both = [name for name in names if _split(name)[1] in sides]
        if len(both) == 2 == len(names) and len({_split(name)[0] for name in both}) == 1:
            one, other = sorted(both)
            return _verdict(record, one, other)
    return None


def _split(name: str) -> tuple[str, str]:
    return name[:-1], name[-1]


def _verdict(record: Mapping[str, Any], one: str, other: str) -> Ranking | None:
    sides = one[-1], other[-1]
    readers: list[tuple[tuple[str, ...], bool, Callable[..., Scores]]] = [
        *(((name,), True, _signed) for name in _SIGNED),
        # Stanford Human Preferences: 1 stands for A, and 0 for B.
        *([(("labels",), False, _one_is_first)] if one == "human_ref_A" else []),
        ((f"winner_model_{sides[0]}", f"winner_model_{sides[1]}"), False, _scores),
        *(((name,), False, _named(one, other)) for name in _NAMED),
        *(((f"{n}_{sides[0]}", f"{n}_{sides[1]}"), True, _scores) for n in _SCORED),
    ]
    for columns, is_scale, read in readers:
        if all(column in record for column in columns):
            words = f"answers from {ticked((one, other))} by {ticked(columns)}"
            taken = [one, other, *columns, *(c for c in ("winner_tie",) if c in record)]
            taken += ["prompt"] if _are_lists(record, one, other) else []
            return Ranking(tuple(taken), _reader(one, other, columns, read), is_scale, words)
    return None


def _reader(
    one: str, other: str, columns: tuple[str, ...], read: Callable[..., Scores]
) -> Callable[[Mapping[str, Any], str], list[Answer]]:
    def answers(record: Mapping[str, Any], where: str) -> list[Answer]:
        values = [record.get(column) for column in columns]
        what = f"{ticked(columns)} in {where}"
        scores = None if None in values else read(what, *values)
        contents = [
            _content(record.get(name), record, f"`{name}` in {where}") for name in (one, other)
        ]
        return [
            Answer(content, None if scores is None else score)
            for content, score in zip(contents, scores or (None, None), strict=True)
        ]

    return answers


def _content(value: Any, record: Mapping[str, Any], what: str) -> Any:
    """The answer; if it is a list of texts, as in one set of Chatbot Arena, the conversation."""
    if value is None:
        raise ValueError(f"{what} must be an answer; got {found(value)}.")
    replies, asked = from_json_list(value), from_json_list(record.get("prompt"))
    if replies is None or asked is None:
        return as_messages(value)
    turns = []
    for question, reply in zip(asked, replies, strict=False):
        turns += [{"role": "user", "content": question or ""}]
        turns += [{"role": "assistant", "content": reply or ""}]
    return turns


def _are_lists(record: Mapping[str, Any], *names: str) -> bool:
    return all(from_json_list(record.get(name)) for name in ("prompt", *names))


def _signed(what: str, value: Any) -> Scores:
    return 0.0, as_number(value, what)


def _scores(what: str, one: Any, other: Any) -> Scores:
    return as_number(one, what), as_number(other, what)


def _one_is_first(what: str, value: Any) -> Scores:
    number = as_number(value, what)
    if number not in (0, 1):
        raise ValueError(f"{what} must be 1 for the first answer or 0; got {found(value)}.")
    return number, 1 - number


def _named(one: str, other: str) -> Callable[..., Scores]:
    def read(what: str, value: Any) -> Scores:
        text = str(value).strip().lower().removesuffix(".0")
        if _TIE.fullmatch(text):
            return 0.0, 0.0
        sides = one[-1].lower(), other[-1].lower()
        side = text if text in sides else re.sub(r"^\w*[_ ]", "", text)
        if side not in sides:
            raise ValueError(
                f"{what} must name {sides[0]} or {sides[1]}, or say that it is a tie; got "
                f"{found(value)}."
            )
        return (1.0, 0.0) if side == sides[0] else (0.0, 1.0)

    return read
