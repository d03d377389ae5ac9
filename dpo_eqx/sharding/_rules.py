"""Rules, by path, for which axis of a parameter is sharded over which axis of the mesh.

A default applies to leaves without a rule. `_policy.py` puts arrays on the mesh.
"""

import math
import re
from collections.abc import Callable, Mapping

from jax.sharding import Mesh, PartitionSpec as P

from .._jax.partitioning import AXES, EXPERT, FSDP
from ._mesh import size_of

Shape = tuple[int, ...]
# A specification of the trailing axes of a leaf, or a function that returns one of all axes.
Rule = P | Callable[[Shape, Mesh], P]
Rules = Mapping[str, Rule]

# Smaller arrays are replicated: sharding saves little memory, and costs a collective at each use.
SMALL = 2**12
# `layers.attention.query.weight` is stacked; `layers.0.weight` is in one layer of a tuple.
_STACK = re.compile(r"(^|\.)layers\.(?!\d)")


def either(*specs: P) -> Callable[[Shape, Mesh], P]:
    """A rule: uses the first of several specifications whose axes all divide.

    ```python
    rules = {r"head\\.weight$": sharding.either(P("tensor", "fsdp"), P(None, "fsdp"), P())}
    ```

    **Arguments:**

    - `specs`: specifications of the trailing axes of a leaf.
    """

    def choose(shape: Shape, mesh: Mesh) -> P:
        aligned = [align(spec, shape) for spec in specs if len(spec) <= len(shape)]
        fitting = (spec for spec in aligned if not misfits(spec, shape, mesh))
        # If none fits, the last one is returned, so that the error names it.
        return next(fitting, aligned[-1] if aligned else P())

    return choose


def largest(shape: Shape, mesh: Mesh) -> P:
    """The default rule: the largest axis that divides is sharded over `fsdp`."""
    return _largest(shape, mesh, first=0)


def stacked(shape: Shape, mesh: Mesh) -> P:
    """A rule for leaves that are stacked along their first axis, which is never sharded.

    The largest of the other axes that divides is sharded over `fsdp`; small leaves are replicated.

    ```python
    rules = {r"(^|\\.)blocks\\.": sharding.stacked}
    ```
    """
    return _largest(shape, mesh, first=1)


def _largest(shape: Shape, mesh: Mesh, *, first: int) -> P:
    count = size_of(mesh, FSDP)
    axes = [axis for axis in range(first, len(shape)) if shape[axis] % count == 0]
    if not axes or math.prod(shape[first:]) < SMALL:
        return P()
    chosen = max(axes, key=lambda axis: shape[axis])
    return P(*("fsdp" if axis == chosen else None for axis in range(chosen + 1)))


# Sharded over the vocabulary, so that the loop over chunks of tokens in `_head/linear.py` works
# within the shards. Sharded over the width, its gradient would be summed once for each chunk.
_VOCABULARY = either(P(("tensor", "fsdp"), None), P(None, ("fsdp", "tensor")), P(None, "fsdp"), P())


def _scales(*axes: str) -> Rule:
    """Scales of quantised weights are sharded as the weights, on axes whose blocks divide."""

    def choose(shape: Shape, mesh: Mesh) -> P:
        lead = (None, EXPERT) if len(shape) > len(axes) + 1 else (None,)
        # The format without blocks has one scale for each output, and so fewer axes.
        spec = P(*(*lead, *axes)[: len(shape)])
        whole = misfits(spec, shape, mesh)
        return P(*(None if axis in whole else entry for axis, entry in enumerate(spec)))

    return choose


def _or_whole(spec: P) -> Rule:
    """A rule for stacked leaves: `spec`, but an axis that `tensor` does not divide stays whole."""
    choose = either(spec, P(*(None if entry == "tensor" else entry for entry in spec)), P())

    def within_stack(shape: Shape, mesh: Mesh) -> P:
        # Vectors of Adafactor have too few axes; the first one is that of the stack.
        return choose(shape, mesh) if len(shape) > len(spec) else stacked(shape, mesh)

    return within_stack


def _projections(into: str, out: str, rule: Callable[[P], Rule]) -> Rules:
    """The rules of linear layers that go into a block, and of those that lead out of it.

    As in Megatron: the first matrix of a block is sharded over its outputs, the second over its
    inputs, and one sum over `tensor` ends the block. An adapter is sharded along the axis that it
    shares with its layer. Quantised layers are sharded as other layers.
    """
    return {
        into + r"(\.base)?\.weight$": rule(P("tensor", "fsdp")),
        into + r"(\.base)?\.stored\.codes$": rule(P("tensor", "fsdp")),
        into + r"(\.base)?\.stored\.scales$": _scales("tensor", "fsdp"),
        into + r"(\.base)?(\.layer)?\.bias$": rule(P("tensor")),
        into + r"\.(up|pinned\.1)$": rule(P("tensor", None)),
        out + r"(\.base)?\.weight$": rule(P("fsdp", "tensor")),
        out + r"(\.base)?\.stored\.codes$": rule(P("fsdp", "tensor")),
        out + r"(\.base)?\.stored\.scales$": _scales("fsdp", "tensor"),
        out + r"\.(down|pinned\.0)$": rule(P(None, "tensor")),
    }


def _experts(into: str, out: str) -> Rules:
    """The rules of layers with a matrix for each expert, whose axis is sharded over `expert`.

    They do not apply to dense layers, which have an axis less.
    """
    stored = r"(\.base)?\.(weight|stored\.codes)$"
    bias = r"(\.base)?(\.layer)?\.bias$"
    return {
        into + stored: P(EXPERT, "tensor", "fsdp"),
        into + bias: P(EXPERT, "tensor"),
        into + r"\.(up|pinned\.1)$": P(EXPERT, "tensor", None),
        into + r"\.(down|pinned\.0)$": P(EXPERT, None, "fsdp"),
        out + stored: P(EXPERT, "fsdp", "tensor"),
        out + bias: P(EXPERT, "fsdp"),
        out + r"\.(up|pinned\.1)$": P(EXPERT, "fsdp", None),
        out + r"\.(down|pinned\.0)$": P(EXPERT, None, "tensor"),
    }


_INTO = r"(attention\.(query|key|value|gate)|feed_forward\.(gate|up))"
_OUT = r"(attention\.output|feed_forward\.down)"
_INTO_RECURRENCE = r"recurrence\.(query|key|value|gate|input_gate|output_gate|rate|decay)"
TRANSFORMER: Rules = {
    r"(^|\.)(embedding|head)(\.base)?\.weight$": _VOCABULARY,
    r"(^|\.)head\.bias$": either(P("tensor"), P()),
    **_experts(r"feed_forward\.(gate|up)", r"feed_forward\.down"),
    **_projections(_INTO, _OUT, lambda spec: spec),
    # Recurrent layers may have fewer heads than `tensor` has devices.
    **_projections(_INTO_RECURRENCE, r"recurrence\.output", _or_whole),
    # Small.
    r"recurrence\.(\w+_)?filter\.(weight|bias)$": P(),
}
"""The rules for `models.Transformer` and its adapters, which apply if no rules are given.

Other models have none of these paths, so the default applies to them.
"""


def spec_of(path: str, shape: Shape, mesh: Mesh, rules: Rules) -> P:
    """The sharding of a leaf: from the first rule that matches its path, else from the default.

    **Raises:**

    `ValueError` if a rule names an axis that the mesh does not have, or one that does not divide.
    """
    # Adafactor stores vectors for the rows and columns of a matrix under the matrix's path. The
    # rule for the matrix has too many axes for them.
    axes = len(shape) - bool(_STACK.search(path))
    matching = (rule for pattern, rule in rules.items() if re.search(pattern, path))
    fitting = (rule for rule in matching if not isinstance(rule, P) or len(rule) <= axes)
    rule = next(fitting, stacked if _STACK.search(path) else largest)
    spec = align(rule, shape) if isinstance(rule, P) else rule(shape, mesh)
    _check(spec, path, shape, mesh)
    return _within(spec, mesh)


def align(spec: P, shape: Shape) -> P:
    """Extends a specification of the trailing axes to all axes; axes of size 1 are not sharded."""
    entries = [None] * (len(shape) - len(spec)) + list(spec)
    return P(*(None if size == 1 else e for e, size in zip(entries, shape, strict=True)))


def misfits(spec: P, shape: Shape, mesh: Mesh) -> list[int]:
    """The axes of a leaf that the mesh does not divide."""
    pairs = enumerate(zip(_with_expert(spec), shape, strict=False))
    return [axis for axis, (entry, size) in pairs if size % size_of(mesh, entry)]


def _with_expert(spec: P) -> P:
    """The specification with `fsdp` and `expert` in place of `fsdp`, unless it names `expert`."""
    entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
    if any(EXPERT in entry for entry in entries):
        return spec
    whole = {FSDP[0]: FSDP}
    return P(*(tuple(n for name in entry for n in whole.get(name, (name,))) for entry in entries))


def _within(spec: P, mesh: Mesh) -> P:
    """The specification without the axes that the mesh does not have, whose size counts as 1."""

    def present(entry):
        names = (entry,) if isinstance(entry, str) else entry or ()
        names = tuple(name for name in names if name in mesh.axis_names)
        return names[0] if len(names) == 1 else names or None

    return P(*map(present, _with_expert(spec)))


def _check(spec: P, path: str, shape: Shape, mesh: Mesh) -> None:
    names = [n for e in spec for n in ((e,) if isinstance(e, str) else e or ())]
    unknown = [name for name in names if name not in (*AXES, *mesh.axis_names)]
    if unknown:
        raise ValueError(
            f"`rules` must name axes of the mesh, {', '.join(mesh.axis_names)}; for `{path}` they "
            f"name {unknown[0]!r}."
        )
    for axis in misfits(spec, shape, mesh):
        entry = _within(spec, mesh)[axis]
        raise ValueError(
            f"`mesh` must divide the axes that it shards: axis {axis} of `{path}`, of shape "
            f"{shape}, has {shape[axis]} entries for {entry}={size_of(mesh, entry)}. Choose a size "
            f"that divides {shape[axis]}, or replicate that axis by a rule of your own, "
            f"`rules={{{path!r}: PartitionSpec()}}`."
        )
