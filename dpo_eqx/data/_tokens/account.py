"""The account of a conversation: which of its texts the chat template rendered, and which it lost.

`template.py` renders the conversation; `report.py` counts what was lost.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Messages = Sequence[Mapping[str, Any]]

# The keys of a message under which a model's words are kept.
_TEXTS = ("content", "reasoning_content", "reasoning", "thinking", "tool_plan", "refusal")
_CALLS = ("tool_calls", "function_call")
# Keys that say how parts belong together; templates need not write them.
_STRUCTURE = ("role", "type", "id", "index", "tool_call_id")
# Templates write reasoning and answer between tags of their own, and trim each line.
_BETWEEN = re.compile(r"</?[\w|:. -]{1,30}>|\n")


class Piece(NamedTuple):
    """A text of a conversation: the number of its message, its key there, and the text."""

    message: int
    key: str
    text: str


class Rendered:
    """A rendered text, in which the pieces of a conversation are looked up.

    **Arguments:**

    - `text`: what the chat template returned, or a part of it.
    """

    def __init__(self, text: str):
        self.text = text

    @functools.cached_property
    def _squeezed(self) -> str:
        return _squeeze(self.text)

    def lost(self, text: str) -> list[str]:
        """The parts of `text` that are not here, whatever space, tags or escapes are around it."""
        stripped = text.strip()
        if stripped in self.text:  # the usual case
            return []
        if _squeeze(stripped) in self._squeezed or self._holds_escaped(stripped):
            return []
        return [part for part in _parts_of(stripped) if not self._holds_part(part)]

    def is_gone(self, text: str) -> bool:
        """Whether no part of `text` is here."""
        lost = self.lost(text)
        return bool(lost) and len(lost) == len(_parts_of(text))

    def _holds_part(self, part: str) -> bool:
        return _squeeze(part) in self._squeezed or self._holds_escaped(part)

    def _holds_escaped(self, text: str) -> bool:
        """Whether the text is here as JSON or Python writes it, as in a tool call."""
        forms = {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
        return any(_squeeze(form) in self._squeezed for form in forms | {repr(text)[1:-1]})


def _parts_of(text: str) -> list[str]:
    """The lines of a text, and what is between its tags."""
    return [part.strip() for part in _BETWEEN.split(text) if part.strip()]


def _squeeze(text: str) -> str:
    return "".join(text.split())


def pieces_of(messages: Messages) -> Iterator[Piece]:
    """The texts that a reader of the messages would see, with text in tool calls."""
    for number, message in enumerate(messages):
        for key, value in message.items():
            if key in _TEXTS:
                texts: Iterable[str] = _texts(value)
            elif key in _CALLS:
                texts = _call_texts(value)
            else:
                continue
            yield from (Piece(number, key, text) for text in texts if text and not text.isspace())


def unused_keys(messages: Messages, rendered: Rendered) -> set[str]:
    """The further keys of messages whose text is not rendered, such as a time or a name."""
    known = (*_TEXTS, *_CALLS, *_STRUCTURE)
    return {
        key
        for message in messages
        for key, value in message.items()
        if key not in known and isinstance(value, str) and rendered.lost(value)
    }


def tool_texts(value: Any) -> Iterator[str]:
    """The texts of tools: names, descriptions, the names and choices of parameters."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from tool_texts(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key in ("name", "description", "enum"):
                yield from _all(item)
            elif key == "properties" and isinstance(item, Mapping):
                yield from item
                yield from tool_texts(list(item.values()))
            else:
                yield from tool_texts(item)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (part["text"] for part in value if isinstance(part.get("text"), str))


def _call_texts(value: Any) -> Iterator[str]:
    """The texts of calls: the name of the function, the names and values of its arguments."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _call_texts(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key == "function":
                yield from _call_texts(item)
            elif key not in _STRUCTURE:
                yield from _all(_parsed(item) if key == "arguments" else item)
    elif isinstance(value, str):
        yield value


def _all(value: Any) -> Iterator[str]:
    """The texts, numbers and keys at every depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _all(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _all(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _parsed(value: Any) -> Any:
    """Arguments as a mapping, also from JSON text: a template may write either form."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
