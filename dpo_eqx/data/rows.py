"""What one tokenised row holds: a dictionary, so that it can be printed, stored and made by hand.

Rows are made by `tokenize`, kept in a list or on disk, and put into batches by `batches`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from .records import NUMBERS

# A row of a pair holds the lists of integers `prompt_ids`, `chosen_ids`, `rejected_ids`; an
# unpaired one `prompt_ids`, `completion_ids` and the boolean `label`. Either may hold the numbers
# of `records.NUMBERS`, and `start_id` where its prompt is empty: see `start_of`.
Row = dict[str, Any]


@runtime_checkable
class Rows(Protocol):
    """Rows by index: a list, or a `TokenCache` on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...

    def __iter__(self) -> Iterator[Row]: ...


@runtime_checkable
class StoredRows(Rows, Protocol):
    """Rows that know their lengths without being read."""

    def lengths(self) -> Int[np.ndarray, "rows parts"]: ...


def completions_of(row: Row) -> list[str]:
    """The names of the row's completions."""
    return ["completion_ids"] if "completion_ids" in row else ["chosen_ids", "rejected_ids"]


def numbers_of(row: Row) -> list[str]:
    """The names of the row's numbers, in one order for all rows."""
    return [name for name in ("label", *NUMBERS) if name in row]


def lengths_of(rows: Rows) -> Int[np.ndarray, "rows parts"]:
    """The tokens of each row's prompt and of each of its completions."""
    if isinstance(rows, StoredRows):
        return rows.lengths()
    sizes = [[len(row[name]) for name in ("prompt_ids", *completions_of(row))] for row in rows]
    return np.array(sizes, np.int32)


def start_of(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], start_id: int | None
) -> tuple[list[int], int, int]:
    """The prompt that a batch can hold, for a row whose prompt may be empty.

    A batch's prompt has one token at least, and the first token of a sequence is never scored,
    for there is nothing before it. So where the prompt is empty, the first token that all
    completions share becomes it: that changes no log-probability. Where they share none,
    `start_id` stands before them, and the first token of each is context, not scored.

    **Arguments:**

    - `prompt`, `completions`: token ids.
    - `start_id`: the tokenizer's BOS or EOS, if there is one.

    **Returns:**

    `(prompt, taken, context)`: how many tokens each completion loses to the prompt, and how many
    of what is left of it are not scored.

    **Raises:**

    `ValueError` where the completions share no first token and there is no `start_id`.
    """
    if prompt:
        return list(prompt), 0, 0
    first = {completion[0] for completion in completions if completion}
    if len(first) == 1:
        return list(first), 1, 0
    if start_id is None:
        raise ValueError(
            "`prompt_ids` must hold a token where the completions do not begin with the same one; "
            f"got an empty prompt before {sorted(first)}. Put the tokenizer's BOS or EOS there, "
            "or give it as `start_id` of the row."
        )
    return [start_id], 0, 1
