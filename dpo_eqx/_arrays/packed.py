"""Several pairs in one row of tokens: how such a row is made, and a batch of them.

They are laid into rows by `data.pack` and scored by `score_packed`; neither is here.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, Real

from .._jax.scalars import Weights
from .layout import AbstractLayout
from .log_probs import PairLogProbs
from .tokens import as_ids, narrow_on_host


class PackedLayout(AbstractLayout):
    """A row of whole pairs one after the other: prompt, chosen, rejected; prompt, chosen, ...

    It offers what `Layout` offers to whoever attends through `layout.mask()` and takes positions
    from `layout.positions`, and has none of its static widths, since in each row the parts end
    elsewhere.

    **Arguments:**

    - `lengths`: tokens of each pair's prompt, chosen and rejected completion, in the order of the
        row; 0 in what is not there. Shape `(pairs, 3)`, traced; held in int32.
    - `length`: the width of the whole row, padding at its end included.
    - `longest`: tokens that no prompt has more of together with one of its completions.
    - `longest_pair`: tokens that no prompt has more of together with both: no token sees one
        further back in the row.
    """

    lengths: Int[Array, "pairs 3"] = eqx.field(converter=as_ids)
    length: int = eqx.field(static=True)
    longest: int = eqx.field(static=True)
    longest_pair: int = eqx.field(static=True)

    @property
    def pairs(self) -> Int[Array, " length"]:
        """Which pair each token belongs to, -1 in the padding."""
        return jnp.where(self._is_real, self._part // 3, -1)

    @property
    def segments(self) -> Int[Array, " length"]:
        """0 in a prompt, 1 in a chosen and 2 in a rejected completion, -1 in the padding."""
        return jnp.where(self._is_real, self._part % 3, -1)

    @property
    def positions(self) -> Int[Array, " length"]:
        """Each token's position in its own sequence, from 0; 0 in the padding.

        Those of a completion go on from its prompt's.
        """
        pair, segment = self.pairs, self.segments
        in_part = self._places - self._starts[pair, segment]
        before = jnp.where(segment > 0, self.lengths[pair, 0], 0)
        return jnp.where(self._is_real, in_part + before, 0)

    def mask(self) -> Bool[Array, "length length"]:
        """True at `[j, i]` where token `j` sees token `i`.

        That is where `i <= j`, both are of one pair, and `i` is of the prompt or in `j`'s own
        completion. Every token sees itself, so that no row is empty.
        """
        pair, segment, place = self.pairs, self.segments, self._places
        causal = place[None, :] <= place[:, None]
        same_pair = pair[None, :] == pair[:, None]
        same_segment = segment[None, :] == segment[:, None]
        return causal & same_pair & (same_segment | (segment[None, :] == 0))

    @property
    def predicts(self) -> Int[Array, " length"]:
        """For every token of a completion, the place of the token whose hidden state predicts it.

        The one before it; for the first of a completion, the last of its prompt.
        """
        pair, starts = self.pairs, self._starts
        is_first = self._places == starts[pair, self.segments]
        last_of_prompt = starts[pair, 0] + self.lengths[pair, 0] - 1
        return jnp.where(is_first & (self.segments > 0), last_of_prompt, self._places - 1)

    @property
    def _places(self) -> Int[Array, " length"]:
        return jnp.arange(self.length, dtype=jnp.int32)

    @property
    def _starts(self) -> Int[Array, "pairs 3"]:
        ends = jnp.cumsum(self.lengths.reshape(-1), dtype=jnp.int32)
        return ends.reshape(self.lengths.shape) - self.lengths

    @property
    def _part(self) -> Int[Array, " length"]:
        """How many parts end at a place or before it: the number of the part that is there."""
        ends = (self._starts + self.lengths).reshape(-1)
        return (ends[None, :] <= self._places[:, None]).sum(axis=1, dtype=jnp.int32)

    @property
    def _is_real(self) -> Bool[Array, " length"]:
        return self._places < self.lengths.sum(dtype=jnp.int32)


class PackedBatch(eqx.Module):
    """Rows of several pairs each, made by `data.pack`, for `score_packed`.

    Every array has the rows as its first axis, along which batches are cut, split into
    microbatches and sharded over devices; a row has `slots` places for pairs, some of them empty.
    `weight`, `reference`, `per_pair` and `index` have a value for each of the `rows * slots`
    places: the first place of every row, then the second of every row, and so on.

    **Arguments:**

    - `ids`: token ids. Shape `(rows, length)`.
    - `lengths`: of the prompt, the chosen and the rejected completion in each slot. Shape
        `(rows, slots, 3)`.
    - `scored`: the places of scored tokens in the row, and -1 behind them. Shape
        `(rows, scored)`.
    - `indices`: the number of each pair among those that were packed; -1 in an empty slot. Shape
        `(rows, slots)`.
    - `weights`: of each pair, 0 in an empty slot. Shape `(rows, slots)`.
    - `references`: fields of precomputed `PairLogProbs`, by name. Each `(rows, slots)`.
    - `arguments`: of the loss, by name, as `PreferenceBatch.per_pair`. Each `(rows, slots)`.
    - `longest`, `longest_pair`: of all pairs that were packed, as in `PackedLayout`.

    **Raises:**

    `ValueError` where the arrays do not have the same rows and slots.
    """

    ids: Integer[Array | np.ndarray, "rows length"] = eqx.field(converter=narrow_on_host)
    lengths: Integer[Array | np.ndarray, "rows slots 3"]
    scored: Integer[Array | np.ndarray, "rows scored"]
    indices: Integer[Array | np.ndarray, "rows slots"]
    weights: Real[Array | np.ndarray, "rows slots"]
    references: dict[str, Array | np.ndarray] | None = None
    arguments: dict[str, Array | np.ndarray] | None = None
    longest: int = eqx.field(static=True, kw_only=True)
    longest_pair: int = eqx.field(static=True, kw_only=True)

    def __check_init__(self):
        by_slot = {"indices": self.indices, "weights": self.weights}
        by_slot |= {**(self.references or {}), **(self.arguments or {})}
        for name, value in by_slot.items():
            if value.shape != self.lengths.shape[:2]:
                raise ValueError(
                    f"`{name}` must have one value for each slot of each row, shape "
                    f"{self.lengths.shape[:2]}; got {value.shape}. Make batches by `data.pack`."
                )

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.ids.shape[0]

    @property
    def pairs(self) -> int:
        """The number of slots of all rows, empty ones included."""
        return self.indices.shape[0] * self.indices.shape[1]

    @property
    def index(self) -> Integer[Array | np.ndarray, " pairs"]:
        """The number of each pair among those that were packed, -1 where there is none."""
        return by_pair(self.indices)

    @property
    def weight(self) -> Weights:
        """The weight of each pair, 0 where there is none."""
        return by_pair(self.weights)

    @property
    def reference(self) -> PairLogProbs | None:
        """Precomputed log-probabilities of each pair."""
        if self.references is None:
            return None
        return PairLogProbs(**{name: by_pair(value) for name, value in self.references.items()})

    @property
    def per_pair(self) -> dict[str, Array | np.ndarray] | None:
        """The loss's arguments of each pair."""
        if self.arguments is None:
            return None
        return {name: by_pair(value) for name, value in self.arguments.items()}

    def with_reference(self, reference: PairLogProbs) -> "PackedBatch":
        """This batch with log-probabilities as `precompute_reference` gives them for it."""
        given = {name: value for name, value in vars(reference).items() if value is not None}
        shape = self.indices.shape[::-1]
        references = {name: value.reshape(shape).swapaxes(0, 1) for name, value in given.items()}
        return dataclasses.replace(self, references=references)

    def take(self, rows: Integer[np.ndarray, " taken"] | slice) -> "PackedBatch":
        """A batch of some of the rows."""
        return jax.tree.map(lambda x: x[rows], self)


def rows_of(batch: Any) -> int:
    """What microbatches and devices split: the rows of a packed batch, the pairs of any other."""
    return batch.rows if isinstance(batch, PackedBatch) else batch.pairs


def by_pair(x: Array | np.ndarray) -> Array | np.ndarray:
    """What is laid out by row and slot, `(rows, slots)`, as one axis of pairs, slot by slot.

    Rows vary fastest, so that a split of the pairs with stride, as microbatches are, is the split
    of the rows with stride.
    """
    return x.swapaxes(0, 1).reshape(-1)
