"""OpenAssistant's messages and trees: each prompt with its ranked replies, and the thread above it.

The replies become several answers with ranks, of which `shapes.py` makes pairs.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .files import Located
from .values import check_text, found, ticked

Counts = collections.Counter[str]

_MESSAGE = {"message_id", "parent_id", "text", "role"}
_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}

NOT_GOOD = "replies that are deleted or not reviewed"
NOT_RANKED = "replies without a rank"
FEW = "prompts with fewer than two ranked replies"
NO_THREAD = "prompts whose thread is incomplete, deleted or not reviewed"


def assembled(
    records: Iterable[Located], where: Mapping[str, Any], left_out: Counts
) -> Iterator[Located]:
    """Records, or prompts with ranked replies if the records are messages or trees of messages.

    **Arguments:**

    - `where`: the values that columns must have; other records are left out.
    - `left_out`: counts what is left out, by reason.
    """
    records = iter(records)
    first = list(itertools.islice(records, 1))
    rows = itertools.chain(first, records)
    if first and _is_tree(first[0][1]):
        rows = (row for place, tree in rows for row in _flat(tree.get("prompt"), None, place))
    if where:
        rows = _filtered(rows, where, left_out)
    if first and (_is_tree(first[0][1]) or first[0][1].keys() >= _MESSAGE):
        return _prompts(rows, left_out)
    return rows


def _is_tree(record: Mapping[str, Any]) -> bool:
    root = record.get("prompt")
    return isinstance(root, Mapping) and {"message_id", "text", "replies"} <= root.keys()


def _flat(message: Any, parent: Any, where: str) -> Iterator[Located]:
    """The messages of a tree, each before its replies."""
    stack = [(message, parent)]
    while stack:
        message, parent = stack.pop()
        if not isinstance(message, Mapping) or message.get("message_id") is None:
            raise ValueError(f"`prompt` in {where} must hold messages; got {found(message)}.")
        row = {name: value for name, value in message.items() if name != "replies"}
        yield where, row | {"parent_id": parent}
        replies = message.get("replies") or []
        stack += [(reply, message["message_id"]) for reply in reversed(replies)]


def _filtered(
    records: Iterable[Located], where: Mapping[str, Any], left_out: Counts
) -> Iterator[Located]:
    words = ", ".join(f"{name}={value}" for name, value in where.items())
    for number, (place, record) in enumerate(records):
        missing = [name for name in where if name not in record]
        if missing and not number:
            raise ValueError(
                f"`where` names `{missing[0]}`, which {place} does not have; found: "
                f"{ticked(record)}."
            )
        if all(_is_value(record.get(name), value) for name, value in where.items()):
            yield place, record
        else:
            left_out[f"records that are not of {words}"] += 1


def _is_value(value: Any, wanted: Any) -> bool:
    """Whether a cell has a value, which may be text, as flags are."""
    if value == wanted or not isinstance(wanted, str):
        return value == wanted
    if isinstance(value, bool) or value is None:
        return str(value).lower() == wanted.lower()
    try:
        return not isinstance(value, str) and float(value) == float(wanted)
    except (TypeError, ValueError):
        return False


def _prompts(rows: Iterable[Located], left_out: Counts) -> Iterator[Located]:
    """Each message of a prompter with two ranked replies, with the thread above it."""
    messages = _by_id(rows)
    are_reviewed = any("review_result" in message for _, message in messages.values())
    replies: dict[Any, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for _, message in messages.values():
        if message["role"] == "assistant":
            replies[message.get("parent_id")].append(message)
    for key, (where, message) in messages.items():
        if message["role"] == "assistant":
            continue
        ranked = list(_ranked(replies[key], are_reviewed, left_out))
        thread = _thread(message, messages, are_reviewed)
        if thread is None:
            left_out[NO_THREAD] += 1
        elif len(ranked) < 2:
            left_out[FEW] += 1
        else:
            texts = [check_text(m.get("text"), f"`text` of a reply to {where}") for m in ranked]
            yield where, {"prompt": thread, "replies": texts, "rank": [m["rank"] for m in ranked]}


def _by_id(rows: Iterable[Located]) -> dict[Any, tuple[str, dict[str, Any]]]:
    messages: dict[Any, tuple[str, dict[str, Any]]] = {}
    for where, row in rows:
        key, role = row.get("message_id"), row.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(
                f"`role` in {where} must be `prompter` or `assistant`; got {found(role)}."
            )
        if key is None or key in messages:
            raise ValueError(
                f"`message_id` in {where} must be given, and differ from all others; got "
                f"{found(key)}."
            )
        check_text(row.get("text"), f"`text` in {where}")
        messages[key] = where, {**row, "role": _ROLES[role]}
    return messages


def _ranked(
    replies: Iterable[Mapping[str, Any]], are_reviewed: bool, left_out: Counts
) -> Iterator[Mapping[str, Any]]:
    for reply in replies:
        if not _is_good(reply, are_reviewed):
            left_out[NOT_GOOD] += 1
        elif reply.get("rank") is None:
            left_out[NOT_RANKED] += 1
        else:
            yield reply


def _is_good(message: Mapping[str, Any], are_reviewed: bool) -> bool:
    """Whether a message is not deleted and, if it is a reply, has passed the review."""
    needs_review = are_reviewed and message["role"] == "assistant"
    return not message.get("deleted") and (not needs_review or message.get("review_result") is True)


def _thread(
    message: Mapping[str, Any],
    messages: Mapping[Any, tuple[str, Mapping[str, Any]]],
    are_reviewed: bool,
) -> list[dict[str, str]] | None:
    """The turns down to `message`; `None` if one of them is missing or must not be used."""
    turns: list[dict[str, str]] = []
    passed = set()
    while _is_good(message, are_reviewed):
        turns.append({"role": message["role"], "content": message["text"]})
        parent = message.get("parent_id")
        if parent is None or parent == "":
            return turns[::-1]
        if parent not in messages or parent in passed:
            return None
        passed.add(parent)
        message = messages[parent][1]
    return None
