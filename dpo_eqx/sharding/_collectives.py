"""The collectives of a compiled program, read from its text: what each moves, and how often.

Bytes are those that a device sends in a ring, the least that any algorithm needs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
SIZES |= {"s64": 8, "u64": 8, "f64": 8}
_OPERATION = re.compile(
    r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<type>.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|"
    r"all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array of a collective operation.

    - `kind`: `"all-gather"` and so on; `shape`, `dtype`: of its result on one device.
    - `devices`: how many take part together; `times`: how often it runs in one call.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    devices: int
    times: int

    @property
    def size(self) -> int:
        """Bytes of the result on one device."""
        return SIZES[self.dtype] * math.prod(self.shape)

    @property
    def ring_bytes(self) -> float:
        """Bytes that a device sends in all runs of it."""
        away = (self.devices - 1) / self.devices
        share = {
            "all-gather": away,
            "all-reduce": 2 * away,
            # Its result is one part of what is reduced.
            "reduce-scatter": self.devices - 1,
            "all-to-all": away,
            "collective-permute": 1,
        }[self.kind]
        return float(self.times * share * self.size)


def collectives(text: str) -> list[Collective]:
    """All of a compiled program, those that move nothing left out."""
    times = _times(text)
    found = []
    for name, line in _lines(text):
        match = _OPERATION.match(line)
        if match is None:
            continue
        devices = _group_size(line, match["kind"])
        # An asynchronous operation gives its operand beside its result, both of one kind.
        for dtype, axes in _SHAPE.findall(re.sub(r"/\*.*?\*/", "", match["type"])):
            shape = tuple(map(int, filter(None, axes.split(","))))
            found.append(Collective(match["kind"], dtype, shape, devices, times.get(name, 0)))
    return [each for each in found if each.devices > 1]


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """The lines of each computation with its name; that of the entry is `ENTRY`."""
    name = ""
    for line in text.splitlines():
        if line[:1].strip() and line.rstrip().endswith("{"):
            first, *_ = line.split()
            name = first.lstrip("%")
        else:
            yield name, line


def _times(text: str) -> dict[str, int]:
    """How often each computation runs: once for each trip of the loops around it."""
    calls: dict[str, list[tuple[str, int]]] = {}
    bounds = {name: int(bound[1]) for name, line in _lines(text) if (bound := _BOUND.search(line))}
    for name, line in _lines(text):
        trips = _trips(line, bounds) if " while(" in line else 1
        for called in _CALLED.findall(line):
            calls.setdefault(name, []).append((called, trips))
    times: dict[str, int] = {}

    def run(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for called, trips in calls.get(name, []):
            run(called, count * trips)

    run("ENTRY", 1)
    return times


def _trips(line: str, bounds: dict[str, int]) -> int:
    """How often a loop runs: as the line says, or by the number in its condition, as on TPUs."""
    known, condition = _TRIPS.search(line), _CONDITION.search(line)
    if known is not None:
        return int(known[1])
    return bounds.get(condition[1], 1) if condition is not None else 1


def _group_size(line: str, kind: str) -> int:
    if kind == "collective-permute":
        return 2
    # `mesh['a'=2,'b'=4] {'b'}`, with an order of the devices between, or `[2,4]<=[8]`, or
    # `{{0,1},{2,3}}`.
    if match := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(match[2])
    match = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if match is None:
        raise ValueError(f"No replica groups are in the line {line.strip()!r} of a program.")
    return match[1].count(",") + 1
