"""Rows of several sources as one: each source gives a share of the rows of an epoch.

`batches.py` shuffles and batches the result like other rows, and resumes it like them.
"""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int

from .._tokens.rows import PER_PAIR, Row, Rows, completions_of, lengths_of, numbers_of

# Makes the key unlike the keys of the epochs' permutations, which have two numbers.
_APART = 0x4D49, 0x58


class Mixture:
    """Rows of several sources in one order. `mix` makes it.

    `str(mixture)` says how many rows each source gives.

    - `counts`: the number of rows of each source.
    """

    def __init__(self, sources: Sequence[Rows], places: Int[np.ndarray, " rows"]):
        self._sources, self._places = sources, places
        self._sizes = [len(rows) for rows in sources]
        self._starts = [0, *itertools.accumulate(self._sizes)]
        given = np.searchsorted(np.sort(places), self._starts)
        self.counts = tuple(np.diff(given).tolist())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Row:
        place = int(self._places[index])
        source = bisect.bisect_right(self._starts, place) - 1
        return self._sources[source][place - self._starts[source]]

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def lengths(self) -> Int[np.ndarray, "rows parts"]:
        """The tokens of each row's prompt and of each of its completions."""
        return np.concatenate([lengths_of(rows) for rows in self._sources])[self._places]

    def __str__(self):
        parts = zip(self.counts, self._sizes, strict=True)
        return ", ".join(f"{n} of {size} rows ({n / len(self):.1%})" for n, size in parts)


def mix(
    sources: Sequence[Rows], *, weights: Sequence[float | int | None] | None = None, seed: int = 0
) -> Mixture:
    """Rows of several sources as one, for `batches`.

    A weight is the share of a source in the rows of an epoch. Sources without a weight divide the
    rest among them, in proportion to their rows. So without any weight, the mixture is all rows of
    all sources, one source after another. If all sources have weights, these are divided by their
    sum.

    With weights, the mixture is as long as it can be without a row twice, so one source at least
    gives all of its rows. `seed` draws the rows of the others, and the order of the sources. The
    rows of each source keep their order. `datasets.interleave_datasets` with `probabilities` and
    `stopping_strategy="first_exhausted"` has these shares on average; here they are exact up to
    rounding. Every epoch has the same rows.

    **Arguments:**

    - `sources`: rows from `tokenize`, or lists of such dictionaries, all with the same columns.
    - `weights`: a positive number or `None` for each source.
    - `seed`: the seed of the draw.

    **Returns:**

    A `Mixture`. `mixture.counts` holds the number of rows of each source.

    **Raises:**

    `ValueError` if there is no source, if one has no rows or other columns than the first, if a
    weight is not positive and finite, or if the weights leave nothing for the sources without one.
    """
    if isinstance(sources, Mapping):
        raise ValueError(
            "`sources` must be a list of rows, in the order of `weights`; got a mapping. Give "
            "`list(sources.values())`."
        )
    weights = [None] * len(sources) if weights is None else list(weights)
    _check_weights(weights, len(sources))
    _check_columns(sources)
    sizes = [len(rows) for rows in sources]
    starts = [0, *itertools.accumulate(sizes)][:-1]
    if all(weight is None for weight in weights):
        return Mixture(sources, np.arange(sum(sizes)))
    counts = _counts(sizes, _shares(sizes, weights))
    rng = np.random.default_rng([*_APART, seed])
    order = rng.permutation(np.repeat(np.arange(len(sizes)), counts))
    places = np.empty(len(order), np.int64)
    for source, (start, size, count) in enumerate(zip(starts, sizes, counts, strict=True)):
        drawn = np.sort(rng.permutation(size)[:count])
        places[order == source] = start + drawn
    return Mixture(sources, places)


def _shares(sizes: Sequence[int], weights: Sequence[float | int | None]) -> list[float]:
    """The share of each source, which sum to 1."""
    given = sum(weight for weight in weights if weight is not None)
    without = sum(size for size, w in zip(sizes, weights, strict=True) if w is None)
    if not without:
        return [(weight or 0.0) / given for weight in weights]
    return [
        (1 - given) * size / without if weight is None else weight
        for size, weight in zip(sizes, weights, strict=True)
    ]


def _counts(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The numbers of rows with these shares, as many as there are without a row twice."""
    pairs = list(zip(sizes, shares, strict=True))
    # 100 rows at a share of 0.1 are 999.9999999999999 rows in all.
    rows = int(min(size / share for size, share in pairs) * (1 + 1e-12))
    return [min(size, max(1, round(share * rows))) for size, share in pairs]


def _check_weights(weights: Sequence[float | int | None], sources: int) -> None:
    if not sources or len(weights) != sources:
        raise ValueError(
            f"`weights` must hold a number or None for each source, at least one; got "
            f"{len(weights)} for {sources} sources."
        )
    for weight in weights:
        if weight is not None and not 0 < weight < np.inf:
            raise ValueError(
                f"`weights` must be positive; got {weight}. Leave out a source of no weight."
            )
    given = sum(weight for weight in weights if weight is not None)
    if None in weights and given >= 1:
        raise ValueError(
            f"`weights` must sum to less than 1 if a source has none; got {given:g}. A weight is "
            "the share of a source, and the sources without one divide the rest. Give each a "
            "weight, or smaller ones."
        )


def _check_columns(sources: Sequence[Rows]) -> None:
    """Raises `ValueError` if a source is empty, or its columns differ from the first's."""
    wanted: list[str] = []
    for number, rows in enumerate(sources):
        if not len(rows):
            raise ValueError(
                f"`sources` must hold a row each; source {number} (from 0) has none. See the "
                "report of `tokenize`."
            )
        columns = _columns(rows[0])
        wanted = wanted or columns
        if columns != wanted:
            raise ValueError(
                f"`sources` must have the same columns; source 0 has {wanted}, and source "
                f"{number} has {columns}. Leave columns out by `columns=` of `read`."
            )


def _columns(row: Row) -> list[str]:
    """The columns that a batch must have in all of its rows or in none."""
    needed = ("label", *PER_PAIR)
    numbers = [n for n in numbers_of(row) if n in needed or n.startswith("reference_")]
    return [*completions_of(row), *numbers]
