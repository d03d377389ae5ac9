"""The prompt that two whole answers share. Nothing here knows about tokens."""

from collections.abc import Sequence
from typing import TypeVar

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


def _shared_length(one: Sequence, other: Sequence) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
