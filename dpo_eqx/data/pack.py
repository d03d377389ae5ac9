"""Several pairs laid into each row of a batch, so that little of it is padding, on the host.

Batches of one pair a row are made in `batches.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, DTypeLike, Int

from ..packed import PackedBatch
from .rows import Row, Rows, start_of

Numbers = dict[str, Array | np.ndarray]


class Pair(NamedTuple):
    """The token ids of a pair, and how many tokens of each completion are not scored."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]
    context: int

    def lengths(self) -> tuple[int, int, int]:
        """Of the three parts, in tokens."""
        return len(self.prompt), len(self.chosen), len(self.rejected)

    def scored(self) -> list[int]:
        """The places of the scored tokens, from the pair's first token."""
        prompt, chosen, rejected = self.lengths()
        ends = prompt + chosen, prompt + chosen + rejected
        starts = prompt + self.context, ends[0] + self.context
        return [*range(starts[0], ends[0]), *range(starts[1], ends[1])]


def pack(
    rows: Rows,
    length: int,
    *,
    slots: int | None = None,
    scored: int | None = None,
    multiple_of: int = 1,
    dtype: DTypeLike = np.float32,
) -> PackedBatch:
    """All pairs of `rows`, several in each row of `length` tokens, for `score_packed`.

    Each pair is laid down as prompt, chosen, rejected, the prompt once for both, and pairs one
    after the other; the longest are placed first, each into the first row that has room for it.
    The result has all of them in rows of one shape; batches are cut from it:

    ```python
    packed = data.pack(rows, 1024, multiple_of=8)
    for taken in np.random.default_rng(0).permutation(packed.rows).reshape(-1, 8):
        policy, opt_state, metrics = step(policy, opt_state, packed.take(taken), reference)
    ```

    **Arguments:**

    - `rows`: pairs from `tokenize`, or a list of such dictionaries.
    - `length`: tokens of a row: what the longest prompt has with both its completions, or more.
    - `slots`: pairs in a row at most, and their places in the batch; by default as many as came
        together.
    - `scored`: scored tokens in a row at most, and their places in the batch, to each of which the
        unembedding is applied; by default as many as came together.
    - `multiple_of`: what the number of rows is a multiple of, by rows without pairs at the end.
    - `dtype`: of weights and other numbers; float64 where the policy is.

    **Returns:**

    A `PackedBatch` of NumPy arrays. `batch.index` says where each pair went.

    **Raises:**

    `ValueError` that names the pairs which do not fit, where there are no rows, or they are not
    pairs, or a size is not positive.
    """
    _check_sizes({"length": length, "slots": slots, "scored": scored, "multiple_of": multiple_of})
    pairs = [_pair(row) for row in _checked(rows)]
    needs = np.array([[sum(p.lengths()), len(p.scored()), 1] for p in pairs])
    limits = zip((length, scored, slots), needs.sum(axis=0), strict=True)
    room = np.array([needed if limit is None else limit for limit, needed in limits])
    _check_fit(needs, room)
    placed = first_fit(needs, room)
    placed += [[]] * (-len(placed) % multiple_of)
    used = np.array([needs[members].sum(axis=0) for members in placed])
    counts = (slots or int(used[:, 2].max()), max(scored or int(used[:, 1].max()), 1))
    arrays = _lay(pairs, placed, length, *counts)
    weights, references, arguments = _numbers(rows, arrays[-1], dtype)
    longest = max(p + max(c, r) for p, c, r in (pair.lengths() for pair in pairs))
    extents = {"longest": longest, "longest_pair": int(needs[:, 0].max())}
    return PackedBatch(*arrays, weights, references, arguments, **extents)


def first_fit(
    needs: Int[np.ndarray, "items resources"], room: Int[np.ndarray, " resources"]
) -> list[list[int]]:
    """Items put into as few bins as first-fit decreasing makes of them, each of the same room.

    The size of an item is its need of whatever it needs most of.
    """
    order = np.argsort(-(needs / np.maximum(room, 1)).max(axis=1), kind="stable")
    left = np.tile(room, (len(needs), 1))
    bins: list[list[int]] = []
    for item in order.tolist():
        fits = (left[: len(bins)] >= needs[item]).all(axis=1)
        chosen = int(fits.argmax()) if fits.any() else len(bins)
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(item)
        left[chosen] -= needs[item]
    return bins


def _pair(row: Row) -> Pair:
    completions = row["chosen_ids"], row["rejected_ids"]
    prompt, taken, context = start_of(row["prompt_ids"], completions, row.get("start_id"))
    chosen, rejected = (completion[taken:] for completion in completions)
    return Pair(prompt, chosen, rejected, context)


def _lay(
    pairs: Sequence[Pair], placed: list[list[int]], length: int, slots: int, scored: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The ids, the lengths, the places of scored tokens and the number of the pair in each slot."""
    ids = np.zeros((len(placed), length), np.int32)
    lengths = np.zeros((len(placed), slots, 3), np.int32)
    places = np.full((len(placed), scored), -1, np.int32)
    indices = np.full((len(placed), slots), -1, np.int32)
    for row, members in enumerate(placed):
        start, filled = 0, 0
        for slot, member in enumerate(members):
            pair = pairs[member]
            tokens = [*pair.prompt, *pair.chosen, *pair.rejected]
            targets = pair.scored()
            ids[row, start : start + len(tokens)] = tokens
            places[row, filled : filled + len(targets)] = start + np.array(targets, np.int32)
            lengths[row, slot], indices[row, slot] = pair.lengths(), member
            start, filled = start + len(tokens), filled + len(targets)
    return ids, lengths, places, indices


def _numbers(
    rows: Rows, indices: Int[np.ndarray, "rows slots"], dtype: DTypeLike
) -> tuple[np.ndarray, Numbers | None, Numbers | None]:
    """The weights, the reference and the loss's arguments in each slot.

    An empty slot has those of the first pair at weight 0: finite, and without influence.
    """
    is_filled, member = indices >= 0, np.maximum(indices, 0)

    def by_slot(name: str, default: float | None = None) -> np.ndarray:
        return np.array([row.get(name, default) for row in rows], dtype)[member]

    names = [f"reference_{which}" for which in ("chosen", "rejected")]
    references = {name.removeprefix("reference_"): name for name in names if name in rows[0]}
    return (
        by_slot("weight", 1.0) * is_filled.astype(dtype),
        {name: by_slot(of) for name, of in references.items()} if len(references) == 2 else None,
        {"beta": by_slot("beta")} if "beta" in rows[0] else None,
    )


def _checked(rows: Rows) -> Rows:
    if len(rows) == 0:
        raise ValueError("`rows` must hold a row at least, got none. See the report of `tokenize`.")
    if "chosen_ids" not in rows[0]:
        raise ValueError(
            "`rows` must be pairs, with `prompt_ids`, `chosen_ids` and `rejected_ids`; got "
            f"{sorted(rows[0])}. Unpaired rows go through `data.batches`."
        )
    return rows


def _check_sizes(sizes: dict[str, int | None]) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be a positive integer, got {value}.")


def _check_fit(needs: Int[np.ndarray, "pairs 3"], room: Int[np.ndarray, " 3"]) -> None:
    """Raises, naming them, where pairs do not fit into a row of their own."""
    for column, name, what in ((0, "length", "tokens"), (1, "scored", "scored tokens")):
        over = np.flatnonzero(needs[:, column] > room[column])
        if over.size:
            first = ", ".join(f"{i} ({needs[i, column]})" for i in over[:5])
            more = f" and {over.size - 5} more" if over.size > 5 else ""
            raise ValueError(
                f"`{name}` must hold each pair, its prompt once and both completions; "
                f"{room[column]} {what} do not hold rows {first}{more}. Take "
                f"{needs[over, column].max()} or more, or cut rows by `max_length` of `tokenize`."
            )
