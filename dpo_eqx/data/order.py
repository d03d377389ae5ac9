"""Which rows make up which batch: a function of the seed and the step alone.

So the position of a run is one number, and every process can tell what the others do. Nothing here
reads a row.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from ..extras import require


def shuffled(positions: Int[np.ndarray, " rows"], rows: int, *key: int) -> Int[np.ndarray, " rows"]:
    """Where a random permutation of `rows` puts `positions`, computed for these alone.

    **Arguments:**

    - `positions`: integers below `rows`.
    - `rows`: how many are permuted; no memory is taken for them.
    - `key`: integers, say a seed and an epoch, each combination another permutation. Mixed, since
        Grain's own seeds of consecutive epochs and of consecutive runs are the same numbers.
    """
    index_shuffle = require("grain.experimental", extra="data").index_shuffle
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return np.array([index_shuffle(int(p), rows - 1, seed, 4) for p in positions], np.int64)


@dataclasses.dataclass(frozen=True)
class Order:
    """The rows of each step, over any number of epochs.

    The last batch of an epoch may be short; the next epoch starts afresh. When shuffled, the order
    is another in each epoch, and rows are grouped by length: of every `window` batches in random
    order, rows that are padded alike are put together, and the batches are shuffled again.

    **Arguments:**

    - `kinds`: of each row, equal for rows that are padded alike.
    - `batch_size`: rows of a global batch.
    - `shuffle`, `seed`: whether, and how.
    - `window`: in batches; 1 does not look at lengths.
    """

    kinds: Int[np.ndarray, " rows"]
    batch_size: int
    shuffle: bool
    seed: int
    window: int

    @property
    def steps(self) -> int:
        """The number of steps of an epoch."""
        return -(-len(self.kinds) // self.batch_size)

    def at(self, step: int) -> Int[np.ndarray, " batch"]:
        """The rows of the global batch of a step, counted from the start of the first epoch."""
        epoch, step = divmod(step, self.steps)
        window, place = divmod(step, self.window)
        return self._window(epoch, window)[place]

    @functools.cached_property
    def _window(self):
        # The last window is asked for again by the steps that follow.
        return functools.lru_cache(maxsize=2)(self._make_window)

    def _make_window(self, epoch: int, window: int) -> list[Int[np.ndarray, " _"]]:
        size = self.window * self.batch_size
        rows = np.arange(window * size, min((window + 1) * size, len(self.kinds)))
        if not self.shuffle:
            return self._split(rows)
        rows = shuffled(rows, len(self.kinds), self.seed, epoch)
        if self.window == 1:
            return self._split(rows)
        batches = self._split(rows[np.argsort(self.kinds[rows], kind="stable")])
        rng = np.random.default_rng([self.seed, epoch, window])
        whole = [batch for batch in batches if len(batch) == self.batch_size]
        return [whole[i] for i in rng.permutation(len(whole))] + batches[len(whole) :]

    def _split(self, rows: Int[np.ndarray, " rows"]) -> list[Int[np.ndarray, " _"]]:
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
