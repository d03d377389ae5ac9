"""Other names of the columns of answers, as public data sets and other trainers have them."""

from collections.abc import Mapping
from typing import Any

from .turns import as_messages, is_foreign, is_messages

_NOUNS = ("response", "responses", "answer", "completion", "output", "text", "message", "messages")
_NOUNS += ("conversation", "conversations", "summary", "reply")
_CHOSEN = ("chosen", "preferred", "accepted", "better", "good", "winning", "positive")
_REJECTED = ("rejected", "dispreferred", "non_preferred", "unpreferred", "worse", "bad", "losing")
_REJECTED += ("negative",)
_BARE = {
    "chosen": ("preferred", "accepted", "better", "winner", "response_j"),
    "rejected": ("dispreferred",),
}
_BARE["rejected"] += ("non_preferred", "unpreferred", "worse", "loser", "response_k")


def names_of(record: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Our names for columns that have other names."""
    names: dict[str, str] = {}
    if not ("chosen" in record and "rejected" in record) and "completion" not in record:
        found_here = {side: _answers(record, side) for side in ("chosen", "rejected")}
        if all(len(columns) == 1 for columns in found_here.values()):
            names = {side: columns[0] for side, columns in found_here.items()}
        elif len(found_here["rejected"]) == 1 and ends_with_answer(record.get("messages")):
            names = {"rejected": found_here["rejected"][0]}
    if names.get("chosen") == "response" and isinstance(record.get("query"), str):
        names["question"] = "query"
    if "kto_tag" in record:
        names["label"] = "kto_tag"
    if "label" in record and not names and "completion" not in record:
        single = [name for name in ("response", "answer", "output") if _is_answer(record, name)]
        names |= {"completion": single[0]} if len(single) == 1 and "chosen" not in record else {}
    return tuple((ours, name) for ours, name in names.items() if ours != name)


def _answers(record: Mapping[str, Any], side: str) -> list[str]:
    """The columns that hold the answer of one side."""
    if side in record:
        return [side]
    stems = _CHOSEN if side == "chosen" else _REJECTED
    known = {f"{a}_{b}" for stem in stems for n in _NOUNS for a, b in ((stem, n), (n, stem))}
    known |= set(_BARE[side])
    columns = [name for name in record if str(name).lower() in known and _is_answer(record, name)]
    if side == "chosen" and not columns:
        # ms-swift: the chosen answer is `response`, or the last turn of `messages`.
        beside = {"response": "rejected_response", "messages": "rejected_messages"}
        columns = [name for name, other in beside.items() if name in record and other in record]
    return columns


def ends_with_answer(messages: Any) -> bool:
    """Whether messages, in any form, end with a turn of the assistant."""
    turns = as_messages(messages)
    return is_messages(turns) and turns[-1].get("role") == "assistant"


def _is_answer(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    return isinstance(value, str) or is_messages(value) or is_foreign(value)


def moved_of(record: Mapping[str, Any], names: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """`record` with our names."""
    taken = {name for _, name in names}
    kept = {name: value for name, value in record.items() if name not in taken}
    return kept | {ours: record.get(name) for ours, name in names}
