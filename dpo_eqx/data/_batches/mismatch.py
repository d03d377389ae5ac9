"""KTO's mismatched completions: for each prompt a completion of another prompt, over all rows.

They are not rolled inside a batch, so that microbatches and devices change nothing.
"""

import itertools

import numpy as np
from jaxtyping import Int

from .._tokens.rows import Rows
from .order import shuffled

# Makes the key unlike the keys of the epochs' permutations, which have two numbers.
_APART = 1, 0x4B4C


def mismatched(
    rows: Rows, indices: Int[np.ndarray, " batch"], seed: int, ends: dict[int, int]
) -> Int[np.ndarray, " batch"]:
    """For each of `indices` the row whose completion follows its prompt.

    A random permutation of all rows pairs them, so that each completion is used about once. If it
    gives a row with the same prompt, the next row with another prompt is taken.

    **Arguments:**

    - `rows`: all rows.
    - `indices`: the rows of a batch.
    - `seed`: the seed. The draw is the same in every epoch, process and batch size.
    - `ends`: filled with the next row of another prompt for each row that a search has passed. All
        calls for the same rows share it, so that all searches together take linear time.
    """
    drawn = shuffled(indices, len(rows), seed, *_APART).tolist()
    pairs = zip(indices.tolist(), drawn, strict=True)
    return np.array([_next_other(rows, index, start, ends) for index, start in pairs])


def _next_other(rows: Rows, index: int, start: int, ends: dict[int, int]) -> int:
    prompt, passed, candidate = rows[index]["prompt_ids"], [], start
    while rows[candidate]["prompt_ids"] == prompt:
        passed.append(candidate)
        candidate = ends.get(candidate, (candidate + 1) % len(rows))
    # The rows passed all have one prompt, so the next search among them ends at the same row.
    ends.update(dict.fromkeys(passed, candidate))
    return candidate


def check_mismatchable(rows: Rows) -> None:
    """Raises `ValueError` if all rows have the same prompt, so that no mismatch exists."""
    first = rows[0]["prompt_ids"]
    if all(row["prompt_ids"] == first for row in itertools.islice(rows, 1, None)):
        raise ValueError(
            "`rows` must have two different prompts at least, for the mismatched completions of "
            f"KTO; got {len(rows)} rows with one prompt. Add prompts, or give `kl=False`."
        )
