"""The data of a run. `reading.py` has the flags that other commands share."""

import dataclasses

from .reading import Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFlags(Reading):
    """Which preferences are trained and evaluated on, and how they are read."""

    data: tuple[str, ...]
    """Preferences: JSON Lines, JSON, CSV, TSV, Parquet or Arrow (plain or compressed), a folder, or
    a hub name. Several are a mixture, each with its share of the rows, if given, as
    `a.jsonl:0.3`."""
    eval_data: tuple[str, ...] = ()
    """Held-out preferences, evaluated before the first step, every `--eval-every` steps, and at
    the end. Several sets have names, as `helpful=a.jsonl harmless=b.jsonl`."""
    eval_fraction: float | None = None
    """The fraction of the prompts of `--data` to hold out, in place of `--eval-data`. A hash of the
    prompt chooses them, so that they are the same in every run."""
    eval_split: str | None = None
    """The split of `--eval-data`, if it has several (default: train)."""
    offset_column: str | None = None
    """The column of the offset of `--loss odpo` (default: the difference of the scores,
    if the data have any)."""
    strict: bool = False
    """Raise an error for a row that would be dropped or cut, has two equal completions, or has text
    that the chat template leaves out."""
    shuffle: bool = True
    """Give each epoch a new random order; otherwise keep the order of the file."""
