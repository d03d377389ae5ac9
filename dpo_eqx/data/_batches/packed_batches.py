"""An iterator of packed batches: rows of several pairs, shuffled, split over processes, resumable.

`pack.py` decides which pairs share a row, and `order.py` which rows share a batch.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import DTypeLike, Int

from ..._arrays.packed import PackedBatch
from .._fingerprint import digest
from .._tokens.rows import Rows, is_single
from .average import Average
from .batches import Batches, batches, check_sizes, share_of
from .buckets import PackedShapes
from .first_fit import GROUP, first_fit
from .order import Order
from .pack import Packing, measure, place

# The lengths of rows to choose from, in multiples of the longest pair. A longer row leaves less
# padding, and attention computes more that it masks.
_CANDIDATES = (1, 1.25, 1.5, 2, 3)
# The shortest length is chosen whose positions are at most so many times the fewest.
_ENOUGH = 1.02


@dataclasses.dataclass(frozen=True)
class PackedBatcher:
    """Makes the packed batch of any step: this process's rows of it."""

    packing: Packing
    order: Order
    share: slice
    tokens: int
    batch_size: int
    buckets: None = None

    @property
    def rows(self) -> Rows:
        """The rows of token ids, one for each pair."""
        return self.packing.rows

    def __call__(self, step: int) -> PackedBatch:
        """The batch of a step, counted from the start of the first epoch."""
        real = self.order.at(step).tolist()
        # A short batch is filled up with empty rows.
        real += [-1] * (self.order.batch_size - len(real))
        return self.packing.take(real[self.share])

    def widest(self) -> int:
        """The first step, since all have one shape."""
        return 0

    def shapes(self) -> PackedShapes:
        """The shape of all batches, and the padding of an epoch."""
        return self._shapes

    @functools.cached_property
    def _shapes(self) -> PackedShapes:
        padded = batches(self.rows, batch_size=self.batch_size, seed=self.order.seed, prefetch=0)
        with padded as unpacked:
            return PackedShapes(
                rows=self.order.batch_size,
                length=self.packing.length,
                steps=self.order.steps,
                pairs=len(self.rows),
                tokens=self.tokens,
                unpacked=unpacked.shapes().padding,
                unit="completions" if is_single(self.rows[0]) else "pairs",
            )


def packed_batches(
    rows: Rows,
    *,
    batch_size: int,
    length: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int | None = 1,
    process_index: int = 0,
    process_count: int = 1,
    multiple_of: int = 1,
    prefetch: int = 2,
    dtype: DTypeLike = np.float32,
    average: Average = "rows",
) -> Batches:
    """An iterator of `PackedBatch`es of one shape, for `score_packed` or `score_packed_unpaired`.

    All pairs are packed once, as by `pack`, and each epoch has each pair once. Every global batch
    has the same number of rows, which hold `batch_size` pairs on average; so the number of pairs
    differs between batches. Pairs that share a row stay together in all epochs.
    `str(batches.shapes())` reports the shape and the share of padding.

    **Arguments:**

    - `rows`: pairs or single completions from `tokenize`, or a list of such dictionaries. Below,
        a single completion with its prompt is a pair.
    - `batch_size`: the average number of pairs in a *global* batch.
    - `length`: tokens in a row, at least as many as the longest prompt with both its completions.
        By default it is chosen from the data: the shortest with nearly the least padding.
    - `shuffle`: whether the order of the packed rows is random, and different in each epoch; if
        false, it is that of the packing.
    - `seed`: the seed of the order.
    - `epochs`: the number of passes over `rows`; `None` is endless.
    - `process_index`, `process_count`: as `jax.process_index()` and `jax.process_count()`.
    - `multiple_of`: the rows of a global batch are a multiple of this: the number of devices that
        share a batch, times the microbatches. They may hold more pairs than `batch_size`:
        `batches.shapes()` says how many a step has.
    - `prefetch`: the number of batches made in advance; 0 makes each batch on request.
    - `dtype`: the dtype of weights and other numbers; float64 if the policy is float64.
    - `average`: what the weighted means of a step run over, for single completions, as in
        `batches`.

    **Returns:**

    `Batches`, with `get_state()` and `set_state(state)`.

    **Raises:**

    `ValueError` if there are no rows, if a pair is longer than `length`, if a size is not positive,
    if the processes do not divide the rows of a batch, or if `average="tokens"` is given for pairs.
    """
    sizes = {"batch_size": batch_size, "multiple_of": multiple_of, "process_count": process_count}
    sizes |= {} if epochs is None else {"epochs": epochs}
    sizes |= {} if length is None else {"length": length}
    check_sizes(sizes, prefetch, seed)
    measured = measure(rows)
    length = length or _best_length(measured.needs)
    packing = place(rows, measured, length, dtype=dtype, average=average)
    count = _rows_of_a_batch(len(packing.placed), len(rows), batch_size, multiple_of)
    order = Order(np.zeros(len(packing.placed), np.int64), count, shuffle, seed, window=1)
    share = share_of(count, process_index, process_count)
    tokens = int(measured.needs[:, 0].sum())
    batcher = PackedBatcher(packing, order, share, tokens, batch_size)
    # As in `batches`, positions stored before there was `average` stay valid.
    averaged = () if average == "rows" else (average,)
    settings = digest("packed", measured.needs, packing.length, count, shuffle, seed, *averaged)
    return Batches(batcher, epochs, prefetch, settings)


def _best_length(needs: Int[np.ndarray, "pairs 3"]) -> int:
    """The shortest of the candidates that leaves nearly as little padding as any."""
    longest = int(needs[:, 0].max())
    # Multiples of 16 suit the tiles of all devices.
    lengths = sorted({-(-int(longest * factor) // 16) * 16 for factor in _CANDIDATES})
    # Some pairs, evenly spaced, show the padding of all.
    sizes = needs[:: -(-len(needs) // GROUP), :1]
    positions = [len(first_fit(sizes, np.array([length]))) * length for length in lengths]
    return next(
        length
        for length, count in zip(lengths, positions, strict=True)
        if count <= _ENOUGH * min(positions)
    )


def _rows_of_a_batch(packed: int, pairs: int, batch_size: int, multiple_of: int) -> int:
    """The number of rows that hold about `batch_size` pairs, a multiple of `multiple_of`."""
    if batch_size >= pairs:
        return -(-packed // multiple_of) * multiple_of
    return max(round(batch_size * packed / pairs / multiple_of), 1) * multiple_of
