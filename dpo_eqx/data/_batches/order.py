"""The rows of each batch, as a function of the seed and the step alone.

So the position of a run is one number, and every process knows the batches of all processes.
Nothing here reads a row.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from ..._extras import require


def shuffled(positions: Int[np.ndarray, " rows"], rows: int, *key: int) -> Int[np.ndarray, " rows"]:
    """The images of `positions` under a random permutation, computed for these positions alone.

    **Arguments:**

    - `positions`: integers below `rows`.
    - `rows`: the number of rows to permute. The permutation takes no memory.
    - `key`: integers, for example a seed and an epoch. Each key gives another permutation. The
        integers are hashed into one seed: the sum of both, which Grain itself uses, would be the
        same for epoch 1 of seed 0 and epoch 0 of seed 1.
    """
    index_shuffle = require("grain.experimental", extra="data").index_shuffle
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return np.array([index_shuffle(int(p), rows - 1, seed, 4) for p in positions], np.int64)


@dataclasses.dataclass(frozen=True)
class Order:
    """The rows of each step, over any number of epochs.

    The last batch of an epoch may be short; it holds no rows of the next epoch. Shuffling gives
    each epoch another order and groups rows by length: within every `window` batches of the random
    order, rows with the same padded widths share a batch, and then the batches are shuffled.

    **Arguments:**

    - `kinds`: a number for each row, equal for rows with the same padded widths.
    - `batch_size`: rows in a global batch.
    - `shuffle`, `seed`: whether the order is random, and its seed.
    - `window`: the number of batches; 1 does not group rows by length.
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
        # The steps of one window follow each other, so caching two windows is enough.
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
        # The short batch stays last, so that all epochs have the same number of steps.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        return [full[i] for i in rng.permutation(len(full))] + batches[len(full) :]

    def _split(self, rows: Int[np.ndarray, " rows"]) -> list[Int[np.ndarray, " _"]]:
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
