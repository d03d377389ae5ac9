"""The words of `--data` and `--eval-data`: a source, with a weight behind it or a name before it.

`data.mix` says what a weight means; nothing here reads a source.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_WEIGHTED = re.compile(r"(.+):([^:/\\]*)", re.DOTALL)
_NAMED = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)
# What a colon may follow that is not a path: a drive, as in `C:data`, or a host, as in
# `http://host:8080`.
_NO_PATH = re.compile(r"[A-Za-z]|\w+://[^/]*")


class DataSource(NamedTuple):
    """A source of preferences, and its weight in the mixture; `None` if it has none."""

    path: str
    weight: float | None


class HeldOut(NamedTuple):
    """A held-out set: its name, which is empty if the set is alone and has none, and its source."""

    name: str
    path: str


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


def held_out_of(texts: Sequence[str]) -> list[HeldOut]:
    """The held-out sets that `--eval-data` names, such as `a.jsonl`, or `good=a.jsonl bad=b.jsonl`.

    **Raises:**

    `ValueError` if one of several sets has no name, or if a name occurs twice.
    """
    sets = [_held_out_of(text) for text in texts]
    names = [held_out.name for held_out in sets]
    if len(sets) > 1 and "" in names:
        path = sets[names.index("")].path
        raise ValueError(
            f"`--eval-data` must give each of several sets a name; {path} has none. Write "
            f"NAME={path}, with letters, digits, `.`, `_` and `-` in the name."
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"`--eval-data` must give each set its own name; `{twice[0]}` is there twice."
        )
    return sets


def _held_out_of(text: str) -> HeldOut:
    parts = _NAMED.fullmatch(text)
    # A path that exists is never taken apart.
    if parts is None or Path(text).exists():
        return HeldOut("", text)
    if not parts[2]:
        raise ValueError(
            f"`--eval-data` must have a path behind the name, as NAME=a.jsonl; got {text!r}."
        )
    return HeldOut(parts[1], parts[2])


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
