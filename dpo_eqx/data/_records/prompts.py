"""The prompt within whole answers and conversations. Nothing here knows about tokens."""

from collections.abc import Sequence
from typing import Any, TypeVar

Whole = TypeVar("Whole", str, list)


def split_shared_prompt(chosen: Whole, rejected: Whole) -> tuple[Whole, Whole, Whole]:
    """The shared prompt and both completions: text is split by character, conversations by turn.

    The prompt is the common prefix of the answers. A space at its end goes to the completions,
    since tokenizers put a space at the start of a word. If one answer is a prefix of the other,
    the last character (or turn) of the shorter answer goes to the completions. This is TRL's rule,
    kept so that the ids are the same. The tokens that the completions then share have the same
    log-probability in both, which cancels in every loss of the difference.

    Differs from TRL in: answers without a common prefix have an empty prompt, not the chosen answer
    without its last character; and an empty answer is allowed.

    **Arguments:**

    - `chosen`, `rejected`: prompt and answer together, both text or both lists of messages.

    **Returns:**

    `(prompt, chosen, rejected)`, of the same type.
    """
    end = _shared_length(chosen, rejected)
    if end == min(len(chosen), len(rejected)):
        end = max(end - 1, 0)
    elif end > 0 and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def split_answer(messages: list[Any], *, first: bool) -> tuple[list[Any], list[Any]]:
    """The prompt of a conversation that ends with an answer, and the answer.

    **Arguments:**

    - `messages`: messages whose last one is the assistant's.
    - `first`: whether the answer begins at the assistant's first turn, so that it holds all of
        them; else it is the turns of the assistant at the end.
    """
    is_answer = [message["role"] == "assistant" for message in messages]
    if first:
        start = is_answer.index(True)
    else:
        others = [turn for turn, answers in enumerate(is_answer) if not answers]
        start = others[-1] + 1 if others else 0
    return messages[:start], messages[start:]


def _shared_length(one: Sequence, other: Sequence) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
