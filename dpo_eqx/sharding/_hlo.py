"""The text of a compiled program: its computations, their instructions, and how often each runs.

`_collectives.py` and `_traffic.py` read from it what a step moves.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
_VALUE = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_INDEX = re.compile(r" get-tuple-element\(.*\), index=(\d+)")


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


def times(computations: Mapping[str, Sequence[Instruction]]) -> dict[str, int]:
    """How often each computation runs: once for each trip of the loops around it.

    Each branch of a conditional counts as if it ran.
    """
    counts: dict[str, int] = {}

    def run(name: str, count: int) -> None:
        counts[name] = counts.get(name, 0) + count
        for each in computations.get(name, []):
            trips = _trips(each, computations) if each.kind == "while" else 1
            for name_of_called in each.called:
                run(name_of_called, count * trips)

    run("ENTRY", 1)
    return counts


def _trips(loop: Instruction, computations: Mapping[str, Sequence[Instruction]]) -> int:
    """How often a loop runs: as its line says, or by its condition, as on TPUs.

    The condition compares a counter with a constant, and the body adds to the counter.
    """
    known, condition = _TRIPS.search(loop.line), _CONDITION.search(loop.line)
    if known is not None:
        return int(known[1])
    if condition is None:
        return 1
    test = computations.get(condition[1], [])
    bound = next((_constant(each) for each in test if _constant(each) is not None), None)
    counter = next((_INDEX.search(each.line) for each in test if _INDEX.search(each.line)), None)
    if bound is None:
        return 1
    step = 1 if counter is None else _step(computations.get(loop.called[0], []), int(counter[1]))
    return -(-bound // max(step, 1))


def _step(body: Sequence[Instruction], index: int) -> int:
    """What the body of a loop adds to the counter, which is at this place of its state."""
    by_name = {each.name: each for each in body}
    root = next((each for each in body if each.is_root), None)
    step, name = 0, root.operands[index] if root is not None else ""
    while name in by_name and by_name[name].kind in ("add", "copy"):
        operands = [by_name[x] for x in by_name[name].operands if x in by_name]
        step += sum(_constant(x) or 0 for x in operands)
        name = next((x.name for x in operands if _constant(x) is None), "")
    return step


def _constant(each: Instruction) -> int | None:
    """The value of a scalar constant without a sign."""
    found = _VALUE.search(each.line)
    return int(found[1]) if found else None
