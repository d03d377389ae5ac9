"""From rows to one batch: padded on the right to given widths, masks from lengths.

`batches.py` decides the rows and the widths.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, DTypeLike

from ..._arrays.batches import PreferenceBatch, Tokens, UnpairedBatch
from ..._arrays.log_probs import PairLogProbs, UnpairedLogProbs
from ..._arrays.tokens import narrow_on_host
from .._tokens.rows import PER_PAIR, Row, scored_of, start_of


def pair_batch(
    rows: Sequence[Row],
    fill: Bool[np.ndarray, " pairs"],
    widths: tuple[int, ...],
    dtype: DTypeLike = np.float32,
) -> PreferenceBatch:
    """A batch of rows with `prompt_ids`, `chosen_ids`, `rejected_ids`, in NumPy.

    **Arguments:**

    - `rows`: the rows, all with the same numbers.
    - `fill`: false for a row that only fills the batch: its weight is 0.
    - `widths`: the widths of prompts and of completions, in tokens.
    - `dtype`: the dtype of the numbers.
    """
    parts = [_parts(row, [(row, "chosen_ids"), (row, "rejected_ids")]) for row in rows]
    prompt, chosen, rejected = _pad_all(parts, (*widths, widths[1]))
    reference = None
    if "reference_chosen" in rows[0] and "reference_rejected" in rows[0]:
        reference = PairLogProbs(
            chosen=_column(rows, "reference_chosen", dtype),
            rejected=_column(rows, "reference_rejected", dtype),
            chosen_length=chosen.mask.sum(axis=1, dtype=np.int32),
            rejected_length=rejected.mask.sum(axis=1, dtype=np.int32),
        )
    weight, per_pair = _weight(rows, fill, dtype), _per_pair(rows, dtype)
    return PreferenceBatch(prompt, chosen, rejected, weight, reference, per_pair)


def unpaired_batch(
    rows: Sequence[Row],
    fill: Bool[np.ndarray, " pairs"],
    widths: tuple[int, ...],
    dtype: DTypeLike = np.float32,
    *,
    others: Sequence[Row] | None = None,
    by_tokens: bool = False,
) -> UnpairedBatch:
    """A batch of rows with `prompt_ids`, `completion_ids` and perhaps `label`, in NumPy.

    Completions without a label are desirable: they are what a policy shall learn to write.

    **Arguments:**

    - `rows`, `fill`, `dtype`: as for `pair_batch`.
    - `widths`: the widths of prompts, of completions and, if given, of `others`, in tokens.
    - `others`: for each row a row with the completion of another prompt.
    - `by_tokens`: whether the weight of a row is multiplied by its number of scored tokens.
    """
    mismatched = [[row] for row in rows] if others is None else zip(rows, others, strict=True)
    sources = zip(rows, mismatched, strict=True)
    parts = [_parts(row, [(source, "completion_ids") for source in s]) for row, s in sources]
    prompt, completion, *kl = _pad_all(parts, widths)
    reference = None
    weight = _weight(rows, fill, dtype)
    if by_tokens:
        weight *= completion.mask.sum(axis=1, dtype=np.int32).astype(dtype)
    label = np.array([row.get("label", True) for row in rows], bool)
    if "reference_completion" in rows[0]:
        reference = UnpairedLogProbs(_column(rows, "reference_completion", dtype), label)
    return UnpairedBatch(
        prompt,
        completion,
        label,
        kl[0] if kl else None,
        weight,
        reference,
        _per_pair(rows, dtype),
    )


# Ids, and which of them count; the lengths differ.
Part = tuple[Sequence[int], Bool[np.ndarray, " _"]]


def _parts(row: Row, completions: list[tuple[Row, str]]) -> list[Part]:
    """The ids of the prompt and of each completion, each with a mask of the tokens that count.

    **Arguments:**

    - `completions`: for each completion the row that holds it, and its name there.
    """
    ids = [source[name] for source, name in completions]
    prompt, taken, context = start_of(row["prompt_ids"], ids, row.get("start_id"))
    parts: list[Part] = [(prompt, np.ones(len(prompt), bool))]
    for source, name in completions:
        scored = scored_of(source, name)[taken:]
        scored[:context] = False
        parts.append((source[name][taken:], scored))
    return parts


def _pad_all(parts: list[list[Part]], widths: tuple[int, ...]) -> list[Tokens]:
    return [_pad(column, w) for column, w in zip(zip(*parts, strict=True), widths, strict=True)]


def _pad(column: Sequence[Part], width: int) -> Tokens:
    # Padding is id 0, which every vocabulary has: the mask alone says which positions count.
    ids = np.zeros((len(column), width), np.int32)
    mask = np.zeros((len(column), width), bool)
    for row, (sequence, scored) in enumerate(column):
        ids[row, : len(sequence)] = narrow_on_host(sequence)
        mask[row, : len(sequence)] = scored
    return Tokens(ids, mask)


def _column(rows: Sequence[Row], name: str, dtype: Any) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype)


def _weight(rows: Sequence[Row], fill: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    return np.array([row.get("weight", 1.0) for row in rows], dtype) * fill.astype(dtype)


def _per_pair(rows: Sequence[Row], dtype: DTypeLike) -> dict[str, Array | np.ndarray] | None:
    names = [name for name in PER_PAIR if name in rows[0]]
    return {name: _column(rows, name, dtype) for name in names} or None
