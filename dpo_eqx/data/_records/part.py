"""The part of a source that is held out, chosen by a hash of each record's prompt.

`hold_out.py` makes both parts of a source.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from .lost import texts_of
from .prompts import split_shared_prompt
from .records import Form

# The start of a turn in a dialogue of text, as in hh-rlhf.
_TURN = re.compile(r"(?:^|\n)\s*(?:Assistant|AI|Bot|Response|Answer)\s*:", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Part:
    """One of the two parts of a source; `str(part)` says which.

    **Arguments:**

    - `fraction`: the fraction of the prompts that are held out, in `(0, 1)`.
    - `is_held_out`: whether this is the part that is held out.
    """

    fraction: float
    is_held_out: bool

    def takes(self, record: Mapping[str, Any], form: Form) -> bool:
        """Whether a checked record belongs to this part.

        All records with one prompt belong to one part, whatever stands around them.
        """
        text = json.dumps(_prompt_of(record, form), sort_keys=True)
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
        return (number < self.fraction * 2**64) == self.is_held_out

    def __str__(self):
        return "records to train on" if self.is_held_out else "records held out for evaluation"


def _prompt_of(record: Mapping[str, Any], form: Form) -> Any:
    """The prompt, in one form for text and for a conversation of one turn of the user."""
    if form.tokenized:
        return record["prompt_ids"]
    if "prompt" in record:
        return _plain(record["prompt"])
    if form.unpaired:
        # A text has no prompt, and stands for itself.
        return _plain(_asked(record["messages"]) if "messages" in record else record["text"])
    prompt = split_shared_prompt(record["chosen"], record["rejected"])[0]
    return _plain(_without_answer(prompt) if isinstance(prompt, str) else _to_user(prompt))


def _asked(messages: list[Any]) -> list[Any]:
    """The turns up to the assistant's first, which conversations of one prompt share."""
    roles = [message["role"] for message in messages]
    return messages[: roles.index("assistant")] if "assistant" in roles else messages


def _plain(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt.strip()
    turns = [(message["role"], "".join(_texts(message)).strip()) for message in prompt]
    return turns[0][1] if [role for role, _ in turns] == ["user"] else turns


def _texts(message: Mapping[str, Any]) -> list[str]:
    calls = message.get("tool_calls")
    return [*texts_of(message), *([json.dumps(calls, sort_keys=True)] if calls else [])]


def _without_answer(shared: str) -> str:
    """The prompt without the words with which both answers begin, which differ between pairs."""
    ends = [match.end() for match in _TURN.finditer(shared)]
    end = ends[-1] if ends else shared.rfind("\n") + 1 or len(shared)
    return shared[:end]


def _to_user(shared: list[Any]) -> list[Any]:
    """The turns up to the last one that the assistant did not write."""
    end = len(shared)
    while end and shared[end - 1]["role"] == "assistant":
        end -= 1
    return shared[:end] or shared
