"""The words of `--data`: a source, perhaps with its weight behind a colon.

`data.mix` says what a weight means.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_WEIGHTED = re.compile(r"(.+):([^:/\\]*)", re.DOTALL)
# What a colon may follow that is not a path: a drive, as in `C:data`, or a host, as in
# `http://host:8080`.
_NO_PATH = re.compile(r"[A-Za-z]|\w+://[^/]*")


class DataSource(NamedTuple):
    """A source of preferences, and its weight in the mixture; `None` if it has none."""

    path: str
    weight: float | None


def sources_of(texts: Sequence[str]) -> list[DataSource]:
    """The sources that `--data` names, such as `a.jsonl` or `a.jsonl:0.3`.

    **Raises:**

    `ValueError` if there is none, if a weight is not a positive number, or if weights or sources
    contradict each other.
    """
    sources = [_source_of(text) for text in texts]
    paths = [source.path for source in sources]
    weights = [source.weight for source in sources if source.weight is not None]
    if not sources:
        raise ValueError("`--data` must name a source of preferences; got none.")
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"`--data` must name each source once; {twice[0]} is there twice.")
    if weights and len(sources) == 1:
        raise ValueError(
            f"A weight in `--data` is for several sources; got {texts[0]} alone. Leave out the "
            "weight, or give another source."
        )
    if len(weights) < len(sources) and sum(weights) >= 1:
        raise ValueError(
            f"The weights in `--data` must sum to less than 1 if a source has none; got "
            f"{sum(weights):g}. A weight is the share of a source, and the sources without one "
            "divide the rest. Give each a weight, or smaller ones."
        )
    return sources


def _source_of(text: str) -> DataSource:
    parts = _WEIGHTED.fullmatch(text)
    # A path that exists is never taken apart.
    if parts is None or Path(text).exists():
        return DataSource(text, None)
    path, weight = parts[1], _as_number(parts[2])
    if (weight is None or _NO_PATH.fullmatch(path)) and not Path(path).exists():
        return DataSource(text, None)
    if weight is None or not 0 < weight < math.inf:
        raise ValueError(
            f"The weight of {path} in `--data` must be a positive number, as in {path}:0.3; got "
            f"{parts[2]!r}."
        )
    return DataSource(path, weight)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
