"""Preference pairs from a JSON Lines file, plain or in gzip, line by line.

Every line is accounted for: as a pair, as blank, or as a fault with its number and the reason.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dpo_eqx.data import split_shared_prompt

from .vocabulary import Pair, Widths

GZIP = b"\x1f\x8b"


class Fault(NamedTuple):
    """Why a line gave no pair."""

    line: int  # from 1
    reason: str


@dataclasses.dataclass
class Reading:
    """What a file held; `lines` is the sum of pairs, blank lines and faults."""

    lines: int = 0
    blank: int = 0
    pairs: list[Pair] = dataclasses.field(default_factory=list)
    faults: list[Fault] = dataclasses.field(default_factory=list)


def read_pairs(path: str | Path) -> Reading:
    """All pairs of a file. A wrong line becomes a fault, not an error.

    A line is an object with the texts `prompt`, `chosen` and `rejected`, or with `chosen` and
    `rejected` alone; then the prompt is the start that the two share.

    **Raises:**

    `OSError` if the file cannot be opened.
    """
    reading = Reading()
    with open(path, "rb") as file:
        is_gzip = file.peek(len(GZIP)).startswith(GZIP)
        for line in _lines(gzip.GzipFile(fileobj=file) if is_gzip else file):
            reading.lines += 1
            if isinstance(line, bytes) and not line.strip():
                reading.blank += 1
                continue
            try:
                reading.pairs.append(parse_pair(line))
            except (ValueError, RecursionError) as error:
                reading.faults.append(Fault(reading.lines, str(error)))
    return reading


def parse_pair(line: bytes | Exception) -> Pair:
    """The pair on a line.

    **Raises:**

    `ValueError` with the reason if the line holds no pair.
    """
    if isinstance(line, Exception):
        raise ValueError(f"The rest of the file cannot be read: {line}.")
    record = _json(line.decode("utf-8-sig").strip())
    if not isinstance(record, dict):
        raise ValueError(f"The line must be an object; got {json.dumps(record)[:40]}.")
    names = ("prompt", "chosen", "rejected") if "prompt" in record else ("chosen", "rejected")
    texts = [_text(record, name) for name in names]
    texts = texts if "prompt" in record else split_shared_prompt(*texts)
    pair = Pair(*(text.encode() for text in texts))
    if pair.chosen == pair.rejected:
        raise ValueError("`chosen` and `rejected` are the same, so neither is preferred.")
    return pair


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"The line is not JSON: {error.msg} at column {error.colno}.") from None


def faults(path: str | Path, reading: Reading, limit: int = 20) -> list[str]:
    """A line of text for each fault, up to `limit`, and a last line that counts the others."""
    lines = [f"{path}:{fault.line}: {fault.reason}" for fault in reading.faults[:limit]]
    omitted = len(reading.faults) - limit
    return lines + ([f"{path}: {omitted} more faulty lines"] if omitted > 0 else [])


def usable(reading: Reading, widths: Widths) -> tuple[list[Pair], str]:
    """The pairs that still differ after they are cut, and a text that accounts for every line."""
    room = widths.completion
    pairs = [pair for pair in reading.pairs if pair.chosen[:room] != pair.rejected[:room]]
    # The end token has to fit too.
    prompts = sum(len(pair.prompt) >= widths.prompt for pair in pairs)
    chosen, rejected = (sum(len(pair[i]) >= room for pair in pairs) for i in (1, 2))
    return pairs, (
        f"{reading.lines} lines read: {len(reading.pairs)} pairs, {reading.blank} blank, "
        f"{len(reading.faults)} faulty.\n"
        f"{len(pairs)} pairs used; {len(reading.pairs) - len(pairs)} dropped, whose answers do not "
        f"differ in their first {room} bytes.\n"
        f"Cut to {widths.prompt} tokens, the end kept: {prompts} prompts. Cut to {room}, the start "
        f"kept: {chosen} chosen, {rejected} rejected."
    )


def _text(record: dict, name: str) -> str:
    if name not in record:
        found = ", ".join(sorted(record)) or "nothing"
        raise ValueError(f"`{name}` is missing; the line has {found}.")
    if not isinstance(record[name], str):
        raise ValueError(f"`{name}` must be text; got {json.dumps(record[name])[:40]}.")
    return record[name]


def _lines(file: Iterable[bytes]) -> Iterator[bytes | Exception]:
    """The lines of a file, and at the end the exception if its gzip stream is damaged."""
    try:
        yield from file
    except (EOFError, OSError, zlib.error) as error:
        yield error
