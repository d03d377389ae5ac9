"""The collectives of a compiled program, read from its text: what each moves, and how often.

Bytes are those that a device sends in a ring, the least that any algorithm needs.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ._hlo import SIZES, Buffer, Instruction, instructions, times

_KINDS = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array of a collective operation.

    - `name`: of the operation, which may move several arrays together.
    - `kind`: `"all-gather"` and so on; `shape`, `dtype`: of its result on one device.
    - `devices`: how many take part together; `times`: how often it runs in one call.
    """

    name: str
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
    computations = instructions(text)
    counts = times(computations)
    found = []
    for name, each in _operations(computations):
        kind = each.kind.removesuffix("-start")
        devices = _group_size(each.line, kind)
        found += [
            Collective(each.name, kind, result.dtype, result.shape, devices, counts.get(name, 0))
            for result in _results(each)
        ]
    return [each for each in found if each.devices > 1]


def count_runs(found: Iterable[Collective]) -> int:
    """How many operations run in one call."""
    return sum({each.name: each.times for each in found}.values())


def _operations(
    computations: Mapping[str, Sequence[Instruction]],
) -> Iterator[tuple[str, Instruction]]:
    """The collective operations, each with the name of its computation.

    In programs for TPUs an operation stands again, with its channel, in each fusion that runs while
    it moves and in the one that waits for it.
    """
    fused = {
        name
        for all_of in computations.values()
        for each in all_of
        if each.kind == "fusion"
        for name in each.called
    }
    seen = set()
    for name, all_of in computations.items():
        for each in all_of:
            if each.kind.removesuffix("-start") not in _KINDS:
                continue
            channel = _CHANNEL.search(each.line) if name in fused else None
            if channel is None or channel[1] not in seen:
                yield name, each
            if channel is not None:
                seen.add(channel[1])


def _results(each: Instruction) -> list[Buffer]:
    """An asynchronous operation gives its operands before its results, all-reduces excepted."""
    operands = len(each.operands)
    is_beside = len(each.results) >= 2 * operands
    return each.results[operands : 2 * operands] if is_beside else each.results


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
