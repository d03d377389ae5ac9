"""Several pairs or single completions in one row of tokens: its layout, and a batch of such rows.

Neither `data.pack`, which packs pairs into rows, nor `score_packed`, which scores them, is here.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer, Real

from .._jax.scalars import Weights
from .kinds import check_is_batch
from .layout import AbstractLayout
from .log_probs import PairLogProbs, UnpairedLogProbs
from .tokens import as_ids, narrow_on_host


class PackedLayout(AbstractLayout):
    """A row of several complete pairs: prompt, chosen, rejected; prompt, chosen, ...

    A single completion with its prompt is a pair without a rejected completion.

    It has the same `mask()` and `positions` as `Layout`, for a policy that attends through them. It
    has no static widths, because prompts and completions end at different places in each row.

    **Arguments:**

    - `lengths`: the numbers of tokens of each pair's prompt, chosen and rejected completion, in the
        order of the row; 0 for an absent one. Shape `(pairs, 3)`, traced and held in int32.
    - `length`: the width of the whole row, including the padding at its end.
    - `longest`: an upper bound on the number of tokens of a prompt plus one of its completions.
    - `longest_pair`: an upper bound on the number of tokens of a prompt plus both completions. No
        token sees further back in the row.
    """

    lengths: Int[Array, "pairs 3"] = eqx.field(converter=as_ids)
    length: int = eqx.field(static=True)
    longest: int = eqx.field(static=True)
    longest_pair: int = eqx.field(static=True)

    @property
    def pairs(self) -> Int[Array, " length"]:
        """The index of each token's pair in the row; -1 in the padding."""
        return jnp.where(self._is_real, self._part // 3, -1)

    @property
    def segments(self) -> Int[Array, " length"]:
        """0 in a prompt, 1 in a chosen and 2 in a rejected completion, -1 in the padding."""
        return jnp.where(self._is_real, self._part % 3, -1)

    @property
    def positions(self) -> Int[Array, " length"]:
        """Each token's position in its own sequence, from 0; 0 in the padding.

        The positions of a completion continue from the end of its prompt.
        """
        pair, segment = self.pairs, self.segments
        in_part = self._places - self._starts[pair, segment]
        before = jnp.where(segment > 0, self.lengths[pair, 0], 0)
        return jnp.where(self._is_real, in_part + before, 0)

    def mask(self) -> Bool[Array, "length length"]:
        """True at `[j, i]` if token `j` sees token `i`.

        Token `j` sees `i` if `i <= j`, both belong to one pair, and `i` is in the prompt or in
        `j`'s own completion. Every token sees itself, so no row is empty.
        """
        pair, segment, place = self.pairs, self.segments, self._places
        causal = place[None, :] <= place[:, None]
        same_pair = pair[None, :] == pair[:, None]
        same_segment = segment[None, :] == segment[:, None]
        return causal & same_pair & (same_segment | (segment[None, :] == 0))

    @property
    def predicts(self) -> Int[Array, " length"]:
        """For every token of a completion, the place of the token whose hidden state predicts it.

        This is the token before it. For the first token of a completion, it is the last token of
        its prompt.
        """
        # The token before a rejected completion is the last of the chosen one, not of the prompt.
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
        """The index of the prompt or completion at each place: how many have ended by there."""
        ends = (self._starts + self.lengths).reshape(-1)
        return (ends[None, :] <= self._places[:, None]).sum(axis=1, dtype=jnp.int32)

    @property
    def _is_real(self) -> Bool[Array, " length"]:
        return self._places < self.lengths.sum(dtype=jnp.int32)


class PackedBatch(eqx.Module):
    """Rows of several pairs each, made by `data.pack`, for `score_packed`.

    Single completions with their labels are packed likewise, for `score_packed_unpaired`. Each is
    held as a chosen completion, and there are no rejected ones.

    The first axis of every array is the rows. Along it, batches are cut, split into microbatches
    and sharded over devices. A row has `slots` slots for pairs, some of them empty. `weight`,
    `reference`, `per_pair` and `index` have one value for each of the `rows * slots` slots: first
    the first slot of every row, then the second slot of every row, and so on.

    **Arguments:**

    - `ids`: token ids. Shape `(rows, length)`.
    - `lengths`: the lengths of the prompt, the chosen and the rejected completion in each slot, in
        tokens. Shape `(rows, slots, 3)`.
    - `scored`: the places of the scored tokens in each row, filled up with -1. Shape
        `(rows, scored)`.
    - `indices`: the index of each pair in the data that was packed; -1 in an empty slot. Shape
        `(rows, slots)`.
    - `weights`: the weight of each pair, 0 in an empty slot. Shape `(rows, slots)`.
    - `references`: the fields of precomputed `PairLogProbs` or, for single completions, of
        `UnpairedLogProbs` without the label, by name. Each `(rows, slots)`.
    - `arguments`: arguments of the loss, by name, as in `PreferenceBatch.per_pair`. Each
        `(rows, slots)`.
    - `labels`: for single completions, whether each is desirable, as in `UnpairedBatch.label`;
        `None` for pairs. Shape `(rows, slots)`.
    - `longest`, `longest_pair`: as in `PackedLayout`, over all packed pairs.

    **Raises:**

    `ValueError` if the arrays do not have the same rows and slots.
    """

    ids: Integer[Array | np.ndarray, "rows length"] = eqx.field(converter=narrow_on_host)
    lengths: Integer[Array | np.ndarray, "rows slots 3"]
    scored: Integer[Array | np.ndarray, "rows scored"]
    indices: Integer[Array | np.ndarray, "rows slots"]
    weights: Real[Array | np.ndarray, "rows slots"]
    references: dict[str, Array | np.ndarray] | None = None
    arguments: dict[str, Array | np.ndarray] | None = None
    labels: Bool[Array | np.ndarray, "rows slots"] | None = None
    longest: int = eqx.field(static=True, kw_only=True)
    longest_pair: int = eqx.field(static=True, kw_only=True)

    def __check_init__(self):
        by_slot = {"indices": self.indices, "weights": self.weights}
        by_slot |= {**(self.references or {}), **(self.arguments or {})}
        by_slot |= {} if self.labels is None else {"labels": self.labels}
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
        """The number of slots in all rows, including empty slots."""
        return self.indices.shape[0] * self.indices.shape[1]

    @property
    def index(self) -> Integer[Array | np.ndarray, " pairs"]:
        """The index of each pair in the data that was packed; -1 in an empty slot."""
        return by_pair(self.indices)

    @property
    def weight(self) -> Weights:
        """The weight of each pair; 0 in an empty slot."""
        return by_pair(self.weights)

    @property
    def label(self) -> Bool[Array | np.ndarray, " pairs"] | None:
        """Whether each single completion is desirable; `None` for pairs."""
        return None if self.labels is None else by_pair(self.labels)

    @property
    def reference(self) -> PairLogProbs | UnpairedLogProbs | None:
        """Precomputed log-probabilities of each pair or single completion."""
        if self.references is None:
            return None
        numbers: dict[str, Any] = {n: by_pair(value) for n, value in self.references.items()}
        if self.labels is None:
            return PairLogProbs(**numbers)
        return UnpairedLogProbs(**numbers, label=by_pair(self.labels))

    @property
    def per_pair(self) -> dict[str, Array | np.ndarray] | None:
        """The arguments of the loss for each pair, by name."""
        if self.arguments is None:
            return None
        return {name: by_pair(value) for name, value in self.arguments.items()}

    def with_reference(self, reference: PairLogProbs | UnpairedLogProbs) -> "PackedBatch":
        """This batch with the log-probabilities that `precompute_reference` returned for it."""
        # Without values of single tokens, which no loss reads, and without labels, which are here.
        arrays = jax.Array | np.ndarray
        fields = {
            name: value
            for name, value in vars(reference).items()
            if isinstance(value, arrays) and name != "label"
        }
        # The inverse of `by_pair`.
        shape = self.indices.shape[::-1]
        references = {name: value.reshape(shape).swapaxes(0, 1) for name, value in fields.items()}
        return dataclasses.replace(self, references=references)

    def take(self, rows: Integer[np.ndarray, " taken"] | slice) -> "PackedBatch":
        """A batch of some of the rows."""
        return jax.tree.map(lambda x: x[rows], self)


def rows_of(batch: Any) -> int:
    """What microbatches and devices split: the rows of a packed batch, the pairs of any other."""
    check_is_batch(batch)
    return batch.rows if isinstance(batch, PackedBatch) else batch.pairs


def by_pair(x: Array | np.ndarray) -> Array | np.ndarray:
    """An array of shape `(rows, slots, ...)` with one axis of pairs in their place, slot by slot.

    Rows vary fastest. So a strided split of the pairs, which microbatches are, is also a strided
    split of the rows.
    """
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
