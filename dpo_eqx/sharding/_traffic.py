"""The bytes that a compiled program reads and writes in a device's memory, from its text.

XLA's own count, `compiled.cost_analysis()`, takes each loop once, and there is none for GPUs that
are not there. `_collectives.py` reads what devices send to others.
"""

from collections.abc import Mapping, Sequence

from ._hlo import Buffer, Instruction, instructions, times

Computations = Mapping[str, Sequence[Instruction]]

# They move nothing, or what they call does.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency",
    "async-start",
}  # fmt: skip
_RUNS_WHAT_IT_CALLS = {"while", "conditional", "call", "async-start"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_FUSIONS = {"fusion", "fusion-start"}


def bytes_accessed(text: str) -> int:
    """Each operand of each operation read once, and each result written once, in all runs of loops.

    What stays within a fusion or on the chip does not count, and of an array that is sliced or
    updated in its place only the part does.
    """
    computations = instructions(text)
    counts = times(computations)
    buffers = {each.name: each.results for all_of in computations.values() for each in all_of}
    inside = {
        name
        for all_of in computations.values()
        for each in all_of
        if each.kind not in _RUNS_WHAT_IT_CALLS
        for name in each.called
    }
    return sum(
        counts.get(name, 0) * sum(_of(each, computations, buffers) for each in all_of)
        for name, all_of in computations.items()
        if name not in inside
    )


def _of(each: Instruction, computations: Computations, buffers: Mapping[str, list[Buffer]]) -> int:
    """The bytes of one run of an instruction."""
    if each.kind in _FREE or each.kind.endswith(("-done", "-update")):
        return 0
    operands = [buffers.get(name, []) for name in each.operands]
    if each.kind in _FUSIONS:
        (body,) = each.called
        read = [_read(body, i, computations, _size(x)) for i, x in enumerate(operands)]
        # The type of an asynchronous one has its operands before its results.
        first = 0 if each.kind == "fusion" else sum(map(len, operands))
        return sum(read) + _written(each.results[first:], computations[body])
    if each.kind.endswith("-start"):
        # Its type has its operands beside its results.
        return _size(each.results)
    if each.kind in _SLICES:
        moved = sum(x.size for x in each.results)
        return _if_far(operands[0], moved) + _if_far(each.results, moved)
    if each.kind == "dynamic-update-slice":
        return _size(operands[1]) + _if_far(each.results, sum(x.size for x in operands[1]))
    return sum(map(_size, operands)) + _size(each.results)


def _read(body: str, index: int, computations: Computations, whole: int) -> int:
    """The bytes of an operand that a fusion reads, at most `whole`."""
    start = f"parameter({index})"
    names = {each.name for each in computations[body] if start in each.line}
    read = 0
    for each in computations[body]:
        if not names & set(each.operands):
            continue
        if each.kind == "bitcast":
            names.add(each.name)
        elif each.kind in _SLICES and each.operands[0] in names:
            read += sum(x.size for x in each.results)
        elif each.kind == "fusion":
            places = [i for i, name in enumerate(each.operands) if name in names]
            read += sum(_read(each.called[0], i, computations, whole) for i in places)
        elif each.kind != "dynamic-update-slice" or each.operands[0] not in names:
            return whole
    return min(read, whole)


def _written(results: Sequence[Buffer], body: Sequence[Instruction]) -> int:
    """The bytes that a fusion writes: of an array that it updates in place, the update."""
    by_name = {each.name: each for each in body}
    root = next(each for each in body if each.is_root)
    roots = [by_name[name] for name in root.operands] if root.kind == "tuple" else [root]
    return sum(
        0 if result.is_near else _of_root(each, by_name, result.size)
        for each, result in zip(roots, results, strict=False)
    )


def _of_root(root: Instruction, by_name: Mapping[str, Instruction], whole: int) -> int:
    while root.kind in ("bitcast", "copy") and root.operands[0] in by_name:
        root = by_name[root.operands[0]]
    if root.kind != "dynamic-update-slice":
        return whole
    return min(whole, sum(x.size for x in by_name[root.operands[1]].results))


def _size(buffers: Sequence[Buffer]) -> int:
    """Bytes of those that are not on the chip."""
    return sum(x.size for x in buffers if not x.is_near)


def _if_far(buffers: Sequence[Buffer], moved: int) -> int:
    return moved if _size(buffers) else 0
