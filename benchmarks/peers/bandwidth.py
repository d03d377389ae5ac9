"""The machine's own rate of reading memory: the sum of a large array, on all cores, by NumPy."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.turns import Turns

BYTES = 1 << 29  # far more than any cache


def main() -> None:
    turns = Turns(version=f"NumPy {np.__version__}")
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(BYTES // 4, np.float32), cores)
    with ThreadPoolExecutor(cores) as pool:
        turns.begin()
        going_on = True
        while going_on:
            list(pool.map(np.sum, parts))
            # Not a loss, but the bytes: the parent divides them by the seconds.
            going_on = turns.step_done(BYTES)


if __name__ == "__main__":
    main()
