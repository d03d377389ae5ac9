"""The text of a compiled program: its computations, their instructions, and how often each runs.

`_collectives.py` and `_traffic.py` read from it what a step moves.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]+\d\w*|pred)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<kind>[\w-]+)\("
)
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


class Buffer(NamedTuple):
    """An array of a program; `is_near` if it is in memory on the chip (or the host's)."""

    dtype: str
    shape: tuple[int, ...]
    is_near: bool

    @property
    def size(self) -> int:
        """Bytes; types below a byte count as one byte."""
        return SIZES.get(self.dtype, 1) * math.prod(self.shape)


class Instruction(NamedTuple):
    """One line of a computation.

    - `results`: the arrays of its type, in order.
    - `operands`: names of instructions.
    - `called`: names of computations that it calls.
    """

    name: str
    kind: str
    results: list[Buffer]
    operands: list[str]
    called: list[str]
    is_root: bool
    line: str


def lines(text: str) -> Iterator[tuple[str, str]]:
    """The lines of each computation with its name; that of the entry is `ENTRY`."""
    name = ""
    for line in text.splitlines():
        if line[:1].strip() and line.rstrip().endswith("{"):
            first, *_ = line.split()
            name = first.lstrip("%")
        else:
            yield name, line


def instructions(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation, by its name."""
    found: dict[str, list[Instruction]] = {}
    for name, line in lines(text):
        if match := _INSTRUCTION.match(line):
            found.setdefault(name, []).append(_instruction(match, line))
    return found


def _instruction(match: re.Match[str], line: str) -> Instruction:
    return Instruction(
        match["name"],
        match["kind"],
        buffers(match["type"]),
        _NAME.findall(_within(line, match.end())),
        called(line),
        match["root"] is not None,
        line,
    )


def buffers(type_: str) -> list[Buffer]:
    """The arrays in the text of a type. `S(1)` in a layout is another memory."""
    return [
        Buffer(dtype, tuple(map(int, filter(None, axes.split(",")))), "S(" in layout)
        for dtype, axes, layout in _ARRAY.findall(_COMMENT.sub("", type_))
    ]


def _within(line: str, start: int) -> str:
    """What is between the parenthesis before `start` and the one that closes it."""
    depth = 1
    for end in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        if not depth:
            return line[start:end]
    return line[start:]


def called(line: str) -> list[str]:
    """The computations that a line calls; the condition of a loop is left out."""
    branches = _BRANCHES.search(line)
    return _CALLED.findall(line) + (_NAME.findall(branches[1]) if branches else [])


def times(text: str) -> dict[str, int]:
    """How often each computation runs: once for each trip of the loops around it.

    Each branch of a conditional counts as if it ran.
    """
    calls: dict[str, list[tuple[str, int]]] = {}
    bounds = {name: int(bound[1]) for name, line in lines(text) if (bound := _BOUND.search(line))}
    for name, line in lines(text):
        trips = _trips(line, bounds) if " while(" in line else 1
        for each in called(line):
            calls.setdefault(name, []).append((each, trips))
    counts: dict[str, int] = {}

    def run(name: str, count: int) -> None:
        counts[name] = counts.get(name, 0) + count
        for each, trips in calls.get(name, []):
            run(each, count * trips)

    run("ENTRY", 1)
    return counts


def _trips(line: str, bounds: dict[str, int]) -> int:
    """How often a loop runs: as the line says, or by the number in its condition, as on TPUs."""
    known, condition = _TRIPS.search(line), _CONDITION.search(line)
    if known is not None:
        return int(known[1])
    return bounds.get(condition[1], 1) if condition is not None else 1
