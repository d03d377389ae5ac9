"""Prompts and answers of text as conversations, if the user asks for it.

`layouts.py` makes conversations of public layouts unasked.
"""

import re
from collections.abc import Mapping
from typing import Any

from .layouts import ANSWERS, columns_of_turns

# The start of a turn in a dialogue of text, as in hh-rlhf.
_TURN = re.compile(r"(?:^|\n\n)[ \t]*(Human|User|Assistant|System)[ \t]*:", re.IGNORECASE)
_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "system": "system"}


def as_chat(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`record` with a turn of the user in place of the prompt, and of the assistant for an answer.

    If the prompt, or answers that hold it, is a dialogue with `Human:` and `Assistant:`, its turns
    are those of the dialogue. Conversations stay as they are.

    **Raises:**

    `ValueError` for token ids, and for answers that hold their prompt but are no dialogue.
    """
    if "prompt_ids" in record:
        raise ValueError(
            f"`as_chat` makes turns of text, and {where} holds token ids. Leave it out, or give "
            "the text."
        )
    answers = {name: text for name, text in record.items() if name in ANSWERS}
    if not answers and isinstance(record.get("text"), str):
        rest = {name: value for name, value in record.items() if name != "text"}
        return {**rest, "messages": _whole(record["text"], f"`text` in {where}")}
    texts = {name: text for name, text in answers.items() if isinstance(text, str)}
    if not texts or columns_of_turns(record):
        # Public layouts such as `question` are conversations already.
        return dict(record)
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        asked = _dialogue(prompt)
        # A prompt such as "Human: Why?\n\nAssistant:" ends where the answer begins.
        turns = asked[:-1] if asked and not asked[-1]["content"] else [_turn("user", prompt)]
        replies = {name: [_turn("assistant", text)] for name, text in texts.items()}
        return {**record, "prompt": turns, **replies}
    return {**record, **{n: _whole(text, f"`{n}` in {where}") for n, text in texts.items()}}


def _whole(text: str, what: str) -> list[dict[str, str]]:
    turns = _dialogue(text)
    if turns is None:
        raise ValueError(
            f"{what} must begin with `Human:` or `User:` if `as_chat` makes turns of it, since no "
            "column holds the prompt. Put the prompt into a column `prompt`."
        )
    return turns


def _dialogue(text: str) -> list[dict[str, str]] | None:
    """The turns of a dialogue of text; `None` for other text."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        return None
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [_turn(_ROLES[role.lower()], content.strip()) for role, content in pairs]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
