"""Rows kept on their devices under automatic partitioning, as the types of the arrays tell it.

No function takes a mesh; where there is none, or one of other axes than `dpo_eqx.sharding` makes,
nothing is done. Meshes with explicit axes are in `explicit_meshes.py`, and what is mapped by
`shard_map` or `pmap` in `mapped_axes.py`.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PyTree

from .dtypes import at_least_float32
from .mapped_axes import vary

# The axes over which the rows of a batch are split, together; and all. The last varies fastest over
# the devices, so that it stays within a host where it can.
ROWS = ("data", "fsdp")
AXES = (*ROWS, "tensor")

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

# What `beside_sweeps` has found.
_TAKEN: ContextVar[frozenset[Hashable]] = ContextVar("_TAKEN", default=frozenset())


def row_axes(x: Array | np.ndarray, *beside: PyTree) -> tuple[str, ...] | None:
    """The axes over which the rows of `x`, its first axis, are split, for `vmap(spmd_axis_name=)`.

    `None` where there is no mesh, or where they do not divide the rows. Axes over which a `vmap` of
    the caller splits `x`, or arrays of `beside`, are left to it.
    """
    mesh = mesh_of(x)
    if mesh is None:
        return None
    taken = _taken((x, beside))
    names = tuple(name for name in ROWS if name in mesh.axis_names and name not in taken)
    divides = x.shape[0] % math.prod(mesh.shape[name] for name in names) == 0
    return names if names and divides else None


def beside_sweeps(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """`function`, within which the axes that a `vmap` around it splits over are left to that.

    Inside a loop or a checkpoint of `function` nothing tells that its arrays are under a `vmap`.
    """

    @functools.wraps(function)
    def beside(*args: Arguments.args, **keywords: Arguments.kwargs) -> Returned:
        token = _TAKEN.set(frozenset(_taken((args, keywords))))
        try:
            return function(*args, **keywords)
        finally:
            _TAKEN.reset(token)

    return beside


def keep_rows(x: Array) -> Array:
    """`x`, of one row under a `vmap` with `row_axes`, on the devices that have the row.

    Parameters are split over `fsdp` too. Without this XLA may take it from them to the
    activations, and give every device all rows. How a row itself lies is left to XLA.
    """
    mesh = mesh_of(x)
    if mesh is None:
        return x
    own = P(*[P.UNCONSTRAINED] * x.ndim)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, own))


def over_data(function: Callable[..., Array], rows: Sequence[Array], *shared: PyTree) -> Array:
    """`function(rows, *shared)`, on each part of the rows that `data` makes by itself.

    The gradient of what they share is then summed over the parts once, whatever loops `function`
    has. XLA would sum it inside them: in a loop over chunks of tokens, that of a whole unembedding
    once for each chunk.
    """
    mesh = mesh_of(rows[0])
    parts = 1 if mesh is None else mesh.shape.get("data", 1)
    # JAX has no `shard_map` inside a `vmap` that splits over another axis of the mesh.
    if parts == 1 or rows[0].shape[0] % parts or _taken((rows, shared)):
        return function(rows, *shared)
    split = P("data")
    dtypes = jax.tree.map(lambda x: x.dtype, shared)

    def on_part(rows, *wide):
        here = vary(wide, "data")
        return function(rows, *jax.tree.map(lambda x, dtype: x.astype(dtype), here, dtypes))

    # Wide over the border, so that the sum is: in bf16 it would be poor, and XLA's CPU compiler
    # aborts at it.
    shared = jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), shared)
    return jax.shard_map(
        on_part,
        mesh=mesh,
        in_specs=(split, *(P() for _ in shared)),
        out_specs=split,
        axis_names={"data"},
    )(rows, *shared)


def mesh_of(x: Array | np.ndarray) -> AbstractMesh | None:
    """The mesh on which `x` lies, if there is one of our axes, all of them automatic."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or not set(mesh.axis_names) <= set(AXES):
        return None
    return mesh if set(mesh.axis_types) == {AxisType.Auto} else None


def _taken(tree: PyTree) -> set[Hashable]:
    """The axes of the mesh over which a `vmap(spmd_axis_name=)` around splits arrays of `tree`."""
    names = set(_TAKEN.get())
    for x in jax.tree.leaves(tree):
        if isinstance(x, Tracer):
            with contextlib.suppress(_SeenError):
                _seen.bind(x, names=names.update)
    return names


class _SeenError(Exception):
    """Ends the look at an array, so that nothing of it is in the program."""


def _end(*_, names):
    raise _SeenError


def _look_at_vmap(axis_data, operands, dims, *, names):
    names(axis_data.spmd_name or ())
    return _seen.bind(*operands, names=names), dims[0]


# Goes from a tracer through all transformations around, and asks each `vmap` for its axis: JAX
# refuses a second use of it, and has no other way to know.
_seen = Primitive("dpo_eqx_seen")
_seen.def_abstract_eval(_end)
_seen.def_impl(_end)
ad.deflinear2(_seen, _end)
batching.fancy_primitive_batchers[_seen] = _look_at_vmap
