"""An iterator of batches: shuffled, bucketed, sharded over processes, resumable, prefetched.

`collate.py` makes one batch of its rows, `order.py` selects the rows, `buckets.py` the widths.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import DTypeLike, Int

from ..._arrays.batches import PreferenceBatch, UnpairedBatch
from ..._extras import require
from .._fingerprint import digest
from .._tokens.rows import Row, Rows, lengths_of
from .._tokens.store import digest_ids
from .average import Average, check_average
from .batcher import Batcher
from .buckets import Buckets, PackedShapes, Shapes, choose_buckets, longest
from .collate import pair_batch, unpaired_batch
from .mismatch import check_mismatchable, mismatched
from .order import Order

Indices = Int[np.ndarray, " batch"]
# The steps of endless epochs: no run gets this far, and Grain needs an integer.
_ENDLESS = sys.maxsize


@dataclasses.dataclass(frozen=True)
class PaddedBatcher:
    """Makes the batch of any step: this process's rows, padded to the widths of the global batch.

    All processes use the widths of the global batch, so that they run the same program.
    """

    rows: Rows
    lengths: Int[np.ndarray, "rows parts"]
    order: Order
    buckets: Buckets
    share: slice
    dtype: DTypeLike
    kl: bool
    max_length: int
    average: Average
    # The ends of searches for KTO's mismatched completions: see `mismatched`.
    search_ends: dict[int, int] = dataclasses.field(default_factory=dict)

    def __call__(self, step: int) -> PreferenceBatch | UnpairedBatch:
        """The batch of a step, counted from the start of the first epoch."""
        real = self.order.at(step)
        others = self._others(real)
        widths = self._widths(real, others)
        place = np.arange(self.order.batch_size)[self.share]
        fill = place < len(real)
        # A short batch is filled up with its first row at weight 0: a finite row without influence.
        local = np.where(fill, place, 0)
        rows = [self.rows[int(i)] for i in real[local]]
        if self.lengths.shape[1] == 3:
            return pair_batch(rows, fill, widths, self.dtype)
        mismatched_rows = None
        if others is not None:
            rooms = self._other_lengths(real, others)[local]
            limited = zip(others[local], rooms, strict=True)
            mismatched_rows = [_cut(self.rows[int(j)], int(room)) for j, room in limited]
        by_tokens = self.average == "tokens"
        return unpaired_batch(
            rows, fill, widths, self.dtype, others=mismatched_rows, by_tokens=by_tokens
        )

    def _others(self, indices: Indices) -> Indices | None:
        """For KTO: the rows whose completions follow the prompts of `indices`."""
        return (
            mismatched(self.rows, indices, self.order.seed, self.search_ends) if self.kl else None
        )

    def _other_lengths(self, indices: Indices, others: Indices) -> Indices:
        # At least one token: a completion without tokens would have no log-probability.
        room = self.max_length - self.lengths[indices, 0].astype(np.int64)
        return np.minimum(self.lengths[others, 1], np.maximum(room, 1))

    def _widths(self, indices: Indices, others: Indices | None) -> tuple[int, ...]:
        widths = self.buckets.widths(longest(self.lengths[indices]))
        if others is None:
            return widths
        needed = self._other_lengths(indices, others).max()
        return (*widths, self.buckets.completion_width(int(needed)))

    def shapes(self) -> Shapes:
        """The shapes of the batches in the first epoch, and the share of padding in them."""
        steps: dict[tuple[int, ...], int] = {}
        tokens = int(self.lengths.sum())
        for step in range(self.order.steps):
            real = self.order.at(step)
            others = self._others(real)
            widths = self._widths(real, others)
            steps[widths] = steps.get(widths, 0) + 1
            tokens += 0 if others is None else int(self._other_lengths(real, others).sum())
        padded = sum(self._positions(widths) * count for widths, count in steps.items())
        return Shapes(steps, tokens, padded * self.order.batch_size)

    def widest(self) -> int:
        """The first step of the first epoch whose rows have the most positions."""

        def positions(step: int) -> int:
            real = self.order.at(step)
            return self._positions(self._widths(real, self._others(real)))

        return max(range(self.order.steps), key=positions)

    def _positions(self, widths: tuple[int, ...]) -> int:
        """The positions of one row."""
        # A pair has two completions of one width.
        parts = 2 if self.lengths.shape[1] == 3 else 1
        return widths[0] + parts * widths[1] + sum(widths[2:])


def _cut(row: Row, room: int) -> Row:
    """The first tokens of the completion of an unpaired row."""
    names = (name for name in ("completion_ids", "completion_mask") if name in row)
    return {name: row[name][:room] for name in names}


class Batches(Iterator[Any]):
    """An iterator of batches, which a thread prefetches. `batches` makes it.

    `get_state()` is the position after the last batch taken; prefetched batches do not count. It
    can be stored as JSON. `set_state(state)` returns to that position, also in a run with another
    number of processes: the global batches are the same. `close()`, or leaving a `with` block, ends
    the thread.

    - `steps_per_epoch`: the number of steps, the same on every process.
    - `buckets`: the widths; `None` if the batches are packed.
    """

    def __init__(self, batcher: Batcher, epochs: int | None, prefetch: int, settings: str):
        grain = require("grain", extra="data")
        self._batcher, self._settings = batcher, settings
        self.steps_per_epoch, self.buckets = batcher.order.steps, batcher.buckets
        self._steps = _ENDLESS if epochs is None else epochs * self.steps_per_epoch
        options = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
        dataset = grain.MapDataset.range(self._steps).map(batcher)
        self._iterator = iter(dataset.to_iter_dataset(options))

    @functools.cached_property
    def _name(self) -> str:
        """A digest of all that decides the batches; reading all ids takes a while."""
        return digest(self._settings, digest_ids(self._batcher.rows))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def __len__(self) -> int:
        """The number of batches over all epochs."""
        return self._steps

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get_state(self) -> dict[str, int | str]:
        """The position: the number of steps taken, and a digest of the batches."""
        return {"step": self._iterator.get_state()["next_index"], "batches": self._name}

    def set_state(self, state: dict[str, int | str]) -> None:
        """Returns to the position that `get_state` gave.

        **Raises:**

        `ValueError` if `state` belongs to other rows, batch size, order or widths.
        """
        if state.get("batches") != self._name or not 0 <= int(state["step"]) <= self._steps:
            raise ValueError(
                "`state` must come from batches of the same rows, batch size, order and buckets, "
                f"{self._name!r} of {self._steps} steps; got {state}. Make them with the same "
                "arguments, or start again from the first batch."
            )
        self._iterator.set_state({"next_index": int(state["step"])})

    def shapes(self) -> Shapes | PackedShapes:
        """The shapes of an epoch and the share of padding. This reads lengths only."""
        return self._batcher.shapes()

    def widest(self) -> Any:
        """The batch of the first epoch that takes the most memory. The position stays."""
        return self._batcher(self._batcher.widest())

    def close(self) -> None:
        """Ends the thread that prefetches batches."""
        self._iterator.close()


def batches(
    rows: Rows,
    *,
    batch_size: int,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int | None = 1,
    process_index: int = 0,
    process_count: int = 1,
    buckets: int | Buckets = 4,
    multiple_of: int = 16,
    window: int = 64,
    prefetch: int = 2,
    kl: bool = True,
    max_length: int | None = None,
    dtype: DTypeLike = np.float32,
    average: Average = "rows",
) -> Batches:
    """An iterator of `PreferenceBatch`es, or of `UnpairedBatch`es for unpaired rows, in NumPy.

    `seed` decides everything. A global batch is the concatenation of the batches of all processes,
    for any number of processes, and all processes take the same number of steps. The last batch of
    an epoch is filled up with rows of weight 0.

    Rows are padded to a few widths, which are chosen from the lengths to minimise padding. If the
    rows are shuffled, rows of the same padded widths share a batch. `str(batches.shapes())` reports
    the number of shapes and the share of padding.

    **Arguments:**

    - `rows`: rows from `tokenize`, or a list of such dictionaries.
    - `batch_size`: rows in a *global* batch, over all processes and microbatches.
    - `shuffle`: whether the order is random, and different in each epoch; if false, the order of
        `rows`.
    - `seed`: the seed of the order and of the mismatched completions.
    - `epochs`: the number of passes over `rows`; `None` is endless.
    - `process_index`, `process_count`: as `jax.process_index()` and `jax.process_count()`.
    - `buckets`: the largest number of widths for prompts, and for completions; or the widths.
    - `multiple_of`: every chosen width is a multiple of this, in tokens.
    - `window`: the number of batches among which shuffled rows are grouped by length. If 1, lengths
        do not count, and every batch is a plain random draw.
    - `prefetch`: the number of batches made in advance; 0 makes each batch on request.
    - `kl`: whether unpaired batches have the mismatched completions that KTO needs.
    - `max_length`: the limit of a prompt with a mismatched completion, in tokens; give the limit
        that `tokenize` had.
    - `dtype`: the dtype of weights and other numbers; float64 if the policy is float64.
    - `average`: what the weighted means of a step run over, for unpaired rows. `"tokens"`
        multiplies the weight of a row by its number of scored tokens, so that `losses.sft` is the
        mean over the tokens of the global batch, however microbatches and devices split it.

    **Returns:**

    `Batches`, with `get_state()` and `set_state(state)`.

    **Raises:**

    `ValueError` if there are no rows, sizes are not positive, the processes do not divide the
    batch, the buckets do not hold the longest row, or `average="tokens"` is given for pairs.
    """
    sizes = {"batch_size": batch_size, "multiple_of": multiple_of, "window": window}
    sizes |= {"process_count": process_count}
    sizes |= {"buckets": buckets} if isinstance(buckets, int) else {}
    sizes |= {} if epochs is None else {"epochs": epochs}
    sizes |= {} if max_length is None else {"max_length": max_length}
    check_sizes(sizes, prefetch, seed)
    share = share_of(batch_size, process_index, process_count)
    if len(rows) == 0:
        raise ValueError("`rows` must hold a row at least; got none. See the report of `tokenize`.")
    lengths = lengths_of(rows)
    needed = longest(lengths)
    if isinstance(buckets, int):
        # Rows in their own order cannot be grouped, so each batch has the widths of its longest.
        starts = np.arange(0, len(rows), batch_size)
        padded = needed if shuffle else np.maximum.reduceat(needed, starts)
        buckets = choose_buckets(padded, buckets, multiple_of)
    buckets.check(needed)
    check_average(average, single=lengths.shape[1] == 2)
    order = Order(buckets.kinds(needed), batch_size, shuffle, seed, window)
    kl = kl and lengths.shape[1] == 2
    if kl:
        check_mismatchable(rows)
    limit = sys.maxsize if max_length is None else max_length
    batcher = PaddedBatcher(rows, lengths, order, buckets, share, dtype, kl, limit, average)
    # Positions stored before there was `average` stay valid.
    averaged = () if average == "rows" else (average,)
    settings = digest(lengths, batch_size, shuffle, seed, window, buckets, kl, limit, *averaged)
    return Batches(batcher, epochs, prefetch, settings)


def share_of(batch_size: int, process_index: int, process_count: int) -> slice:
    """The slice of a global batch that belongs to this process."""
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise ValueError(
            "`process_count` must divide `batch_size`, and `process_index` must be below it; got "
            f"{process_count=}, {batch_size=} and {process_index=}."
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def check_sizes(sizes: dict[str, int], prefetch: int, seed: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"`{name}` must be a positive integer; got {value}.")
    for name, value in {"prefetch": prefetch, "seed": seed}.items():
        if value < 0:
            raise ValueError(f"`{name}` must not be negative; got {value}.")
