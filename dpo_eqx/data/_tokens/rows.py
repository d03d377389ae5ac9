"""A tokenised row: a dictionary, so that it can be printed, stored and made by hand.

`tokenize` makes rows, a list or a cache on disk holds them, and `batches` makes batches of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from .._records.records import NUMBERS

# The numbers that are arguments of the loss, one for each pair.
PER_PAIR = ("beta", "offset")

# A row of a pair holds the lists of integers `prompt_ids`, `chosen_ids`, `rejected_ids`; an
# unpaired row holds `prompt_ids`, `completion_ids` and perhaps the boolean `label`. Both may hold
# the numbers of `records.NUMBERS`, and `start_id` if the prompt is empty: see `start_of`. If a
# completion has tokens that are not scored, `chosen_mask` and so on hold a boolean for each token.
Row = dict[str, Any]


@runtime_checkable
class Rows(Protocol):
    """Rows by index: a list, or a `TokenCache` on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...

    def __iter__(self) -> Iterator[Row]: ...


@runtime_checkable
class StoredRows(Rows, Protocol):
    """Rows whose lengths are known without reading them."""

    def lengths(self) -> Int[np.ndarray, "rows parts"]: ...


def completions_of(row: Row) -> list[str]:
    """The names of the row's completions."""
    return ["completion_ids"] if "completion_ids" in row else ["chosen_ids", "rejected_ids"]


def is_single(row: Row) -> bool:
    """Whether the row is a single completion, and not a pair."""
    return len(completions_of(row)) == 1


def mask_name(completion: str) -> str:
    """The name of the column that says which tokens of a completion are scored."""
    return completion.replace("_ids", "_mask")


def scored_of(row: Row, completion: str) -> Bool[np.ndarray, " length"]:
    """Whether each token of a completion is scored, if a token precedes it."""
    mask = row.get(mask_name(completion))
    return np.ones(len(row[completion]), bool) if mask is None else np.array(mask, bool)


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
    """A prompt of at least one token, for a row whose prompt may be empty.

    A batch's prompt has at least one token, and the first token of a sequence is never scored,
    since no token precedes it. If the prompt is empty and all completions share their first token,
    that token becomes the prompt, which changes no log-probability. If they do not, `start_id`
    becomes the prompt, and the first token of each completion is context, not scored.

    **Arguments:**

    - `prompt`, `completions`: token ids.
    - `start_id`: the tokenizer's BOS or EOS, if there is one.

    **Returns:**

    `(prompt, taken, context)`: `taken` is the number of tokens that move from each completion to
    the prompt, and `context` the number of the completion's other tokens that are not scored.

    **Raises:**

    `ValueError` if the completions share no first token and there is no `start_id`.
    """
    if prompt:
        return list(prompt), 0, 0
    first = {completion[0] for completion in completions if completion}
    if len(first) == 1:
        return list(first), 1, 0
    if start_id is None:
        raise ValueError(
            "`prompt_ids` must hold a token if the completions begin with different tokens; "
            f"got an empty prompt before {sorted(first)}. Put the tokenizer's BOS or EOS there, "
            "or give it as `start_id` of the row."
        )
    return [start_id], 0, 1
