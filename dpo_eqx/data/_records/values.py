"""The checks of values in records, and values in words for errors.

`records.py` decides which column gets which check.
"""

import json
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from .nulls import without_nulls


def check_text(value: Any, what: str) -> str:
    """`value` if it is text that can be encoded, else a `ValueError`."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text; got {found(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be text that has a UTF-8 form; character {error.start} is the lone "
            f"surrogate {value[error.start]!r}. Repair or drop the record."
        ) from None
    return value


def check_messages(value: Any, what: str) -> list[dict[str, Any]]:
    """`value` if it is a list of messages with a role and a content, else a `ValueError`.

    Keys with the value `None` are left out at every depth: see `nulls.py`.
    """
    if not isinstance(value, list):
        raise ValueError(
            f"{what} must be a list of messages like the other records'; got {found(value)}."
        )
    return [_check_message(message, f"message {i} of {what}") for i, message in enumerate(value)]


def _check_message(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{what} must be a mapping with a `role` of text; got {found(message)}.")
    message = without_nulls(message)
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(
            f"`weight` of {what} must be 1, or 0 for a turn that is not scored; got "
            f"{found(message['weight'])}."
        )
    content = message.get("content")
    if isinstance(content, str):
        check_text(content, f"`content` of {what}")
    elif isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(part, f"part {number} of `content` of {what}")
    elif content is not None:
        raise ValueError(f"`content` of {what} must be text; got {found(content)}.")
    elif content is None and "tool_calls" not in message:
        raise ValueError(f"{what} must have a `content`; got {found(message)}.")
    return message


def _check_part(part: Any, what: str) -> None:
    """Raises `ValueError` if a part is not text, such as an image."""
    is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
    if not is_text or not isinstance(part.get("text"), str):
        raise ValueError(
            f'{what} must be text, as `{{"type": "text", "text": ...}}`; got {found(part)}. Models '
            "here read text only: put text in its place, or leave the record out."
        )
    check_text(part["text"], what)


def check_ids(value: Any, what: str) -> list[int]:
    """`value` as a list of token ids, also from JSON text, else a `ValueError`."""
    value = _from_json(value)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
        raise ValueError(f"{what} must be a list of integers; got {found(value)}.")
    if any(not 0 <= i < 2**31 for i in value):
        worst = next(i for i in value if not 0 <= i < 2**31)
        raise ValueError(f"{what} must hold token ids from 0 to 2**31 - 1; got {worst}.")
    return list(value)


def check_label(value: Any, what: str) -> bool:
    """`value` as a boolean, also from 0 and 1 and from text, else a `ValueError`."""
    value = value.item() if hasattr(value, "item") else _from_json(value)
    if type(value) not in (bool, int) or value not in (0, 1):
        raise ValueError(
            f"{what} must be true (a desirable completion) or false; got {found(value)}."
        )
    return bool(value)


def check_number(column: str, value: Any, what: str) -> float:
    """`value` as a finite number in the range of its column, else a `ValueError`.

    A number may be text, as all cells of a CSV file are.
    """
    value = value.item() if hasattr(value, "item") else _from_json(value)
    # First a float: an integer of a thousand digits passes comparisons, but converting it raises.
    number = _as_float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number; got {found(value)}.")
    if (column == "weight" and number < 0) or (column == "beta" and not number > 0):
        rule = "not be negative" if column == "weight" else "be positive"
        raise ValueError(f"{what} must {rule}; got {value}.")
    return number


def _from_json(value: Any) -> Any:
    """The number, boolean or list that a text holds, as in a CSV file; else the value itself."""
    if not isinstance(value, str):
        return value
    try:
        # Python writes `True`.
        return json.loads(value.strip().lower())
    except (ValueError, RecursionError):
        return value


def _as_float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, Real) and type(value) is not bool else math.nan
    except OverflowError:
        return math.inf


def found(value: Any) -> str:
    """A value in words for an error: the beginning of its text, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def ticked(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
