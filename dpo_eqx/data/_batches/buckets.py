"""The few widths that rows are padded to, chosen to minimise padding; and what padding is left.

Each pair of widths is one shape, and each shape is one compilation. `order.py` decides which rows
share a batch.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

Lengths = Int[np.ndarray, "rows 2"]


def longest(lengths: Int[np.ndarray, "rows parts"]) -> Lengths:
    """The lengths that decide a row's widths: its prompt's and longest completion's, at least 1."""
    return np.stack([lengths[:, 0], lengths[:, 1:].max(axis=1)], axis=1).clip(1)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The widths of prompts and of completions, in tokens, ascending.

    **Arguments:**

    - `prompt`, `completion`: a row is padded to the smallest width that holds it.

    **Raises:**

    `ValueError` if the widths are not ascending positive integers.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __post_init__(self):
        for name, widths in vars(self).items():
            if not widths or any(a >= b for a, b in zip((0, *widths), widths, strict=False)):
                raise ValueError(
                    f"`{name}` of `Buckets` must be ascending positive widths; got {widths}."
                )

    def of(self, lengths: Lengths) -> Lengths:
        """The index of the smallest prompt and completion width that hold each of `lengths`."""
        columns = zip((self.prompt, self.completion), lengths.T, strict=True)
        return np.stack([np.searchsorted(w, column) for w, column in columns], axis=1)

    def widths(self, lengths: Lengths) -> tuple[int, int]:
        """The prompt and completion width of a batch of rows with these lengths."""
        prompt, completion = self.of(lengths).max(axis=0)
        return self.prompt[prompt], self.completion[completion]

    def kinds(self, lengths: Lengths) -> Int[np.ndarray, " rows"]:
        """A number for each pair of widths: consecutive numbers are neighbouring widths.

        Sorting by it orders rows by completion width. Within every second completion width the
        prompt widths descend. So a batch of rows from two consecutive kinds is padded by one step
        of one width only.
        """
        prompt, completion = self.of(lengths).T
        count = len(self.prompt)
        snake = np.where(completion % 2, count - 1 - prompt, prompt)
        return completion * count + snake

    def completion_width(self, length: int) -> int:
        """The width of a completion of this length."""
        return self.completion[np.searchsorted(self.completion, length)]

    def check(self, lengths: Lengths) -> None:
        """Raises `ValueError` if a row is longer than the greatest width."""
        longest = lengths.max(axis=0, initial=0)
        if longest[0] > self.prompt[-1] or longest[1] > self.completion[-1]:
            raise ValueError(
                f"`buckets` must hold the longest row, of {longest[0]} prompt and {longest[1]} "
                f"completion tokens; got {self.prompt[-1]} and {self.completion[-1]} as the "
                "greatest widths. Add greater widths, or cut rows by `max_length`."
            )


def choose_buckets(lengths: Lengths, count: int, multiple_of: int) -> Buckets:
    """At most `count` prompt widths and `count` completion widths with the least padding.

    **Arguments:**

    - `lengths`: the lengths to pad: of each row, or of each batch if rows keep their order.
    - `count`: the number of widths; 1 is the greatest length alone.
    - `multiple_of`: every width is a multiple of this, in tokens.
    """
    return Buckets(*(_best_widths(column, count, multiple_of) for column in lengths.T))


def _best_widths(
    lengths: Int[np.ndarray, " rows"], count: int, multiple_of: int
) -> tuple[int, ...]:
    """The widths that minimise the padded total, by dynamic programming over the distinct lengths.

    After `k` rounds `cost[j]` is the least padded total of the first `j` distinct lengths in `k`
    widths.
    """
    steps = np.maximum(-(-lengths // multiple_of), 1)
    distinct, frequency = np.unique(steps, return_counts=True)
    before = np.concatenate([[0], np.cumsum(frequency)])
    cost = np.where(np.arange(len(distinct) + 1) == 0, 0.0, np.inf)
    choices = []
    for _ in range(min(count, len(distinct))):
        # total[i, j]: the least cost of the first i distinct lengths, plus one width for i+1 to j.
        added = (before[None, 1:] - before[:-1, None]) * distinct[None, :]
        total = np.where(np.triu(np.ones_like(added, bool)), cost[:-1, None] + added, np.inf)
        choices.append(total.argmin(axis=0))
        cost = np.concatenate([[0.0], total.min(axis=0)])
    widths, end = [], len(distinct)
    for choice in reversed(choices):
        if end:
            widths.append(int(distinct[end - 1]) * multiple_of)
            end = int(choice[end - 1])
    return tuple(reversed(widths))


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of the batches in one epoch; `str(shapes)` gives their number and the padding.

    - `steps`: for each `(prompt width, completion width)` the number of batches that have it.
    - `tokens`: the tokens in all rows.
    - `padded`: the positions in all batches, including rows that only fill a short batch.
    """

    steps: dict[tuple[int, ...], int]
    tokens: int
    padded: int

    @property
    def padding(self) -> float:
        """The share of positions that hold no token, from 0 to 1."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    def __str__(self):
        return (
            f"{len(self.steps)} shapes to compile over {sum(self.steps.values())} steps, "
            f"{self.padding:.1%} padding"
        )


@dataclasses.dataclass(frozen=True)
class PackedShapes:
    """The shape of the packed batches, and the padding; `str(shapes)` gives both.

    - `rows`, `length`: the shape of a global batch.
    - `steps`: the number of batches of an epoch.
    - `pairs`: the pairs of an epoch, or its single completions: `unit` says which.
    - `tokens`: the tokens of all pairs, each prompt once.
    - `unpacked`: the share of padding in batches of as many pairs from `batches`.
    """

    rows: int
    length: int
    steps: int
    pairs: int
    tokens: int
    unpacked: float
    unit: Literal["pairs", "completions"] = "pairs"

    @property
    def padded(self) -> int:
        """The positions in all batches, including rows that only fill the last batch."""
        return self.rows * self.length * self.steps

    @property
    def padding(self) -> float:
        """The share of positions that hold no token, from 0 to 1."""
        return 1 - self.tokens / self.padded

    def __str__(self):
        return (
            f"1 shape to compile over {self.steps} steps, {self.rows} x {self.length} tokens and "
            f"{self.pairs / self.steps:.1f} {self.unit} a step, {self.padding:.1%} padding "
            f"({self.unpacked:.1%} without packing)"
        )
