"""The prompt that two whole answers share. Nothing here knows about tokens."""

from collections.abc import Sequence
from typing import TypeVar

Whole = TypeVar("Whole", str, list)


def split_shared_prompt(chosen: Whole, rejected: Whole) -> tuple[Whole, Whole, Whole]:
    """The prompt, and what is left of either answer: text by characters, conversations by turns.

    The prompt ends where the answers first differ, and before the space there, if there is one,
    since tokenizers put a space at the start of a word. Where one answer is a beginning of the
    other, the last character (or turn) of the shorter goes to the completions. That is TRL's rule,
    kept so that the ids are the same; what the completions then share has the same log-probability
    in both and cancels in every loss of their difference.

    Differs from TRL in: answers that differ from the first character on have an empty prompt, not
    all of the chosen answer but its last character; and an empty answer is no error.

    **Arguments:**

    - `chosen`, `rejected`: prompt and answer in one, both text or both lists of messages.

    **Returns:**

    `(prompt, chosen, rejected)`, of the same type.
    """
    end = _shared_length(chosen, rejected)
    if end == min(len(chosen), len(rejected)):
        end = max(end - 1, 0)
    elif end > 0 and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _shared_length(one: Sequence, other: Sequence) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
