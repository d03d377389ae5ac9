"""Packing on the host: several pairs or completions in each row of a batch, to minimise padding.

`batches.py` makes batches with one pair in each row, and `packed_batches.py` iterates over packed
ones.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Int

from ..._arrays.packed import PackedBatch
from .._tokens.rows import PER_PAIR, Row, Rows, completions_of, is_single, scored_of, start_of
from .average import Average, check_average
from .first_fit import GROUP, first_fit

Numbers = dict[str, Array | np.ndarray]


class Parts(NamedTuple):
    """The token ids of a row: a prompt and its completions, two of a pair or a single one.

    `masks` says of each token of each completion whether it is scored.
    """

    prompt: Sequence[int]
    completions: list[Sequence[int]]
    masks: list[Bool[np.ndarray, " _"]]

    def lengths(self) -> tuple[int, int, int]:
        """The lengths of prompt, chosen and rejected, in tokens; nothing rejected counts as 0."""
        chosen, *rejected = map(len, self.completions)
        return len(self.prompt), chosen, sum(rejected)

    def tokens(self) -> list[int]:
        """All tokens, in the order of a packed row."""
        return [*self.prompt, *itertools.chain.from_iterable(self.completions)]

    def scored(self) -> list[int]:
        """The positions of the scored tokens, counted from the first token."""
        prompt = np.zeros(len(self.prompt), bool)
        return np.flatnonzero(np.concatenate([prompt, *self.masks])).tolist()


def pack(
    rows: Rows,
    length: int,
    *,
    slots: int | None = None,
    scored: int | None = None,
    multiple_of: int = 1,
    dtype: DTypeLike = np.float32,
    average: Average = "rows",
) -> PackedBatch:
    """All pairs of `rows`, several in each row of `length` tokens, for `score_packed`.

    Single completions are packed likewise, for `score_packed_unpaired`: below, each of them with
    its prompt is a pair.

    Each pair is written as prompt, chosen, rejected, with one prompt for both completions, and
    pairs follow one another. Packing is first-fit decreasing: pairs are placed from the longest to
    the shortest, each in the first row with room for it. The result holds all pairs in rows of one
    shape. Take batches from it:

    ```python
    packed = data.pack(rows, 1024, multiple_of=8)
    for taken in np.random.default_rng(0).permutation(packed.rows).reshape(-1, 8):
        policy, opt_state, metrics = step(policy, opt_state, packed.take(taken), reference)
    ```

    **Arguments:**

    - `rows`: pairs or single completions from `tokenize`, or a list of such dictionaries.
    - `length`: tokens in a row; at least as many as the longest prompt with both its completions.
    - `slots`: the largest number of pairs in a row, and the number of slots in the batch. By
        default the largest number that packing gave.
    - `scored`: the largest number of scored tokens in a row, and the number of their positions in
        the batch, all of which are unembedded. By default the largest number that packing gave.
    - `multiple_of`: the number of rows is a multiple of this; empty rows are added at the end.
    - `dtype`: the dtype of weights and other numbers; float64 if the policy is float64.
    - `average`: what weighted means run over, for single completions, as in `batches`.

    **Returns:**

    A `PackedBatch` of NumPy arrays. `batch.index` holds the pair in each slot.

    **Raises:**

    `ValueError` if a pair does not fit (the error names it), if there are no rows, if a size is
    not positive, or if `average="tokens"` is given for pairs.
    """
    _check_sizes({"length": length, "slots": slots, "scored": scored, "multiple_of": multiple_of})
    packing = place(
        rows, measure(rows), length, slots=slots, scored=scored, dtype=dtype, average=average
    )
    count = len(packing.placed)
    return packing.take([*range(count), *[-1] * (-count % multiple_of)])


class Measured(NamedTuple):
    """What the pairs of some rows need.

    - `needs`: the tokens, the scored tokens and the slots (one) of each pair.
    - `longest`: the most tokens of a prompt plus one of its completions.
    """

    needs: Int[np.ndarray, "pairs 3"]
    longest: int


def measure(rows: Rows) -> Measured:
    """What each pair needs; this reads all ids once.

    **Raises:**

    `ValueError` if there are no rows.
    """
    needs, longest = [], 0
    for row in _checked(rows):
        parts = _parts(row)
        prompt, chosen, rejected = parts.lengths()
        needs.append([prompt + chosen + rejected, len(parts.scored()), 1])
        longest = max(longest, prompt + max(chosen, rejected))
    return Measured(np.array(needs), longest)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which pairs share a row; the rows themselves are made by `take`.

    - `rows`: the rows of token ids, one for each pair.
    - `placed`: the pairs in each packed row, in their order.
    - `length`, `slots`, `scored`, `longest`, `longest_pair`: the shape, as in `PackedBatch`.
    - `dtype`: the dtype of weights and other numbers.
    - `tokens`: the number of scored tokens of each pair, if its weight is multiplied by it.
    """

    rows: Rows
    placed: list[list[int]]
    length: int
    slots: int
    scored: int
    longest: int
    longest_pair: int
    dtype: DTypeLike
    tokens: Int[np.ndarray, " pairs"] | None

    def take(self, numbers: Sequence[int]) -> PackedBatch:
        """The packed rows of these numbers; -1 is an empty row."""
        placed = [self.placed[i] if i >= 0 else [] for i in numbers]
        ids, lengths, places, indices = _lay(self, placed)
        weights, references, arguments, labels = _numbers(self, indices)
        return PackedBatch(
            *(ids, lengths, places, indices, weights, references, arguments, labels),
            longest=self.longest,
            longest_pair=self.longest_pair,
        )


def place(
    rows: Rows,
    measured: Measured,
    length: int,
    *,
    slots: int | None = None,
    scored: int | None = None,
    dtype: DTypeLike = np.float32,
    average: Average = "rows",
) -> Packing:
    """Places all pairs in rows; the arguments and errors are those of `pack`."""
    single = is_single(rows[0])
    check_average(average, single=single)
    needs = measured.needs
    limits = zip((length, scored, slots), needs.sum(axis=0), strict=True)
    # A resource without limit gets room for all pairs together, so it never decides.
    room = np.array([needed if limit is None else limit for limit, needed in limits])
    _check_fit(needs, room, single)
    placed = [
        [start + member for member in members]
        for start in range(0, len(needs), GROUP)
        for members in first_fit(needs[start : start + GROUP], room)
    ]
    used = np.array([needs[members].sum(axis=0) for members in placed])
    return Packing(
        rows,
        placed,
        length,
        slots=slots or int(used[:, 2].max()),
        scored=max(scored or int(used[:, 1].max()), 1),
        longest=measured.longest,
        longest_pair=int(needs[:, 0].max()),
        dtype=dtype,
        tokens=needs[:, 1] if average == "tokens" else None,
    )


def kept_together(single: bool) -> str:
    """In words, what a packed row must have room for, if rows are single completions or pairs."""
    return "completion with its prompt" if single else "pair, its prompt once and both completions"


def _parts(row: Row) -> Parts:
    names = completions_of(row)
    prompt, taken, context = start_of(
        row["prompt_ids"], [row[name] for name in names], row.get("start_id")
    )
    masks = [scored_of(row, name)[taken:] for name in names]
    for mask in masks:
        mask[:context] = False
    return Parts(prompt, [row[name][taken:] for name in names], masks)


def _lay(
    packing: Packing, placed: list[list[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The ids, the lengths, the positions of scored tokens and the pair's index in each slot."""
    ids = np.zeros((len(placed), packing.length), np.int32)
    lengths = np.zeros((len(placed), packing.slots, 3), np.int32)
    places = np.full((len(placed), packing.scored), -1, np.int32)
    indices = np.full((len(placed), packing.slots), -1, np.int32)
    for row, members in enumerate(placed):
        start, filled = 0, 0
        for slot, member in enumerate(members):
            parts = _parts(packing.rows[member])
            tokens, targets = parts.tokens(), parts.scored()
            ids[row, start : start + len(tokens)] = tokens
            places[row, filled : filled + len(targets)] = start + np.array(targets, np.int32)
            lengths[row, slot], indices[row, slot] = parts.lengths(), member
            start, filled = start + len(tokens), filled + len(targets)
    return ids, lengths, places, indices


def _numbers(
    packing: Packing, indices: Int[np.ndarray, "rows slots"]
) -> tuple[np.ndarray, Numbers | None, Numbers | None, np.ndarray | None]:
    """The weights, the reference, the loss's arguments and the labels in each slot.

    An empty slot has the numbers of the first pair at weight 0: finite, and without influence.
    """
    members, place = np.unique(np.maximum(indices, 0), return_inverse=True)
    present = [packing.rows[int(member)] for member in members]

    def by_slot(name: str, default: Any = None, dtype: DTypeLike = packing.dtype) -> np.ndarray:
        numbers = np.array([row.get(name, default) for row in present], dtype)
        return numbers[place.reshape(indices.shape)]

    weight = by_slot("weight", 1.0) * (indices >= 0)
    if packing.tokens is not None:
        weight = weight * packing.tokens[np.maximum(indices, 0)]
    completions = [name.removesuffix("_ids") for name in completions_of(present[0])]
    references = {name: f"reference_{name}" for name in completions}
    has_reference = all(name in present[0] for name in references.values())
    return (
        weight.astype(packing.dtype),
        {name: by_slot(of) for name, of in references.items()} if has_reference else None,
        {name: by_slot(name) for name in PER_PAIR if name in present[0]} or None,
        # As in `unpaired_batch`: a completion without a label is one to learn.
        by_slot("label", True, bool) if is_single(present[0]) else None,
    )


def _checked(rows: Rows) -> Rows:
    if len(rows) == 0:
        raise ValueError("`rows` must hold a row at least; got none. See the report of `tokenize`.")
    return rows


def _check_sizes(sizes: dict[str, int | None]) -> None:
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be a positive integer; got {value}.")


def _check_fit(
    needs: Int[np.ndarray, "pairs 3"], room: Int[np.ndarray, " 3"], single: bool
) -> None:
    """Raises `ValueError`, naming the pairs, if some do not fit even in an empty row."""
    for column, name, what in ((0, "length", "tokens"), (1, "scored", "scored tokens")):
        over = np.flatnonzero(needs[:, column] > room[column])
        if over.size:
            first = ", ".join(f"{i} ({needs[i, column]})" for i in over[:5])
            more = f" and {over.size - 5} more" if over.size > 5 else ""
            raise ValueError(
                f"`{name}` must hold each {kept_together(single)}; {room[column]} {what} do not "
                f"hold rows {first}{more}. Take {needs[over, column].max()} or more, or cut rows "
                "by `max_length` of `tokenize`."
            )
