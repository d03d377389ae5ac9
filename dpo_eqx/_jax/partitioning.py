"""Keeps rows on their devices under automatic partitioning.

No function takes a mesh: it is found in the types of the arrays. Without a mesh, or on a mesh whose
axes are not those of `dpo_eqx.sharding`, nothing here has an effect. `explicit_meshes.py` handles
meshes with explicit axes, and `mapped_axes.py` handles `shard_map` and `pmap`.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PyTree

from .dtypes import at_least_float32
from .mapped_axes import vary

# Along `expert`, each device holds some of the experts. Otherwise this axis is a part of `fsdp`:
# all other parameters are split over both together, and rows over `ROWS` together. Heads and wide
# layers are split over `tensor`. The last axis varies fastest over the devices, so that it stays
# within a host if it can.
EXPERT = "expert"
FSDP = ("fsdp", EXPERT)
ROWS = ("data", *FSDP)
TENSOR = "tensor"
AXES = (*ROWS, TENSOR)

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

# The axes that a `vmap` around a function wrapped by `beside_sweeps` splits over.
_TAKEN: ContextVar[frozenset[Hashable]] = ContextVar("_TAKEN", default=frozenset())


def row_axes(x: Array | np.ndarray, *beside: PyTree) -> tuple[str, ...] | None:
    """The axes over which the rows of `x`, its first axis, are split, for `vmap(spmd_axis_name=)`.

    `None` without a mesh, or if the axes do not divide the rows. Axes over which a `vmap` of the
    caller already splits `x`, or arrays of `beside`, are left out.
    """
    mesh = mesh_of(x)
    if mesh is None:
        return None
    taken = taken_axes((x, beside))
    names = tuple(name for name in ROWS if name in mesh.axis_names and name not in taken)
    divides = x.shape[0] % math.prod(mesh.shape[name] for name in names) == 0
    return names if names and divides else None


def beside_sweeps(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """`function`, in which `row_axes` leaves out the axes that a `vmap` around it splits over.

    The axes are found when `function` is called: inside its loops and checkpoints, arrays do not
    show that they are under a `vmap`.
    """

    @functools.wraps(function)
    def beside(*args: Arguments.args, **keywords: Arguments.kwargs) -> Returned:
        token = _TAKEN.set(frozenset(taken_axes((args, keywords))))
        try:
            return function(*args, **keywords)
        finally:
            _TAKEN.reset(token)

    return beside


def keep_rows(x: Array) -> Array:
    """Keeps `x`, one row under a `vmap` with `row_axes`, on the devices that have the row.

    Parameters are sharded over `fsdp`, too. Without this constraint, XLA may propagate their
    sharding to the activations, and gather all rows on every device. XLA chooses the sharding
    within a row.
    """
    mesh = mesh_of(x)
    return x if mesh is None else _within_row(x, mesh, P.UNCONSTRAINED)


def split_tokens(x: Array) -> Array:
    """`keep_rows` of one row whose first axis is its tokens, which are split over `tensor`.

    A layer that is computed again in the backward pass keeps its input. If this input is split,
    each device keeps a part of it, rather than the whole. `join_tokens` undoes it.
    """
    mesh = _mesh_of_tokens(x)
    return keep_rows(x) if mesh is None else _within_row(x, mesh, TENSOR)


def join_tokens(x: Array) -> Array:
    """`keep_rows` of one row whose first axis is its tokens; each device gets all of them."""
    mesh = _mesh_of_tokens(x)
    return keep_rows(x) if mesh is None else _within_row(x, mesh, None)


def _mesh_of_tokens(x: Array) -> AbstractMesh | None:
    """The mesh of `x`, if its axis `tensor` divides the tokens of `x`."""
    mesh = mesh_of(x)
    parts = 1 if mesh is None else mesh.shape.get(TENSOR, 1)
    return None if parts == 1 or x.shape[0] % parts else mesh


def _within_row(x: Array, mesh: AbstractMesh, first: Any) -> Array:
    """`x` with its first axis over `first`. XLA chooses for the other axes."""
    spec = P(first, *[P.UNCONSTRAINED] * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def row_shards(x: Array, names: tuple[str, ...]) -> int:
    """How many shards the rows of `x` have over the axes `names` of the mesh.

    It is 0 without a mesh, or if the axes do not divide the rows.
    """
    mesh = mesh_of(x)
    if mesh is None:
        return 0
    parts = math.prod(mesh.shape[name] for name in names if name in mesh.axis_names)
    return 0 if x.shape[0] % parts else parts


def over_axes(
    names: str | tuple[str, ...] | None,
    function: Callable[..., Returned],
    rows: Sequence[Array],
    *shared: PyTree,
) -> Returned:
    """`function(rows, *shared)`, computed separately on each shard of the rows over mesh axes.

    The gradient with respect to `shared` is then summed over the shards once, whatever loops
    `function` has. XLA would sum inside the loops: in a loop over chunks of tokens, it would sum
    the gradient of a whole unembedding once for each chunk.

    Without a mesh, or if the axes do not divide the rows, it is `function(rows, *shared)`.
    """
    mesh = mesh_of(rows[0])
    wanted = (names,) if isinstance(names, str) else names or ()
    split_over = tuple(name for name in wanted if mesh is not None and name in mesh.axis_names)
    parts = math.prod(mesh.shape[name] for name in split_over) if mesh is not None else 1
    # JAX has no `shard_map` inside a `vmap` that splits over another axis of the mesh.
    if parts == 1 or rows[0].shape[0] % parts or taken_axes((rows, shared)):
        return function(rows, *shared)
    split = P(split_over)
    dtypes = jax.tree.map(lambda x: x.dtype, shared)

    def on_part(rows, *wide):
        here = vary(wide, split_over)
        return function(rows, *jax.tree.map(lambda x, dtype: x.astype(dtype), here, dtypes))

    # Arguments of `shard_map` are in float32, so that the sum of their gradients is, too. A sum in
    # bf16 would be inexact, and XLA's CPU compiler aborts at it.
    shared = jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), shared)
    return jax.shard_map(
        on_part,
        mesh=mesh,
        in_specs=(split, *(P() for _ in shared)),
        out_specs=split,
        axis_names=set(split_over),
    )(rows, *shared)


def mesh_of(x: Array | np.ndarray) -> AbstractMesh | None:
    """The mesh of `x`, or `None` unless all axes are in `AXES` and automatic."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or not set(mesh.axis_names) <= set(AXES):
        return None
    return mesh if set(mesh.axis_types) == {AxisType.Auto} else None


def taken_axes(tree: PyTree) -> set[Hashable]:
    """The axes over which a surrounding `vmap(spmd_axis_name=)` splits arrays of `tree`."""
    names = set(_TAKEN.get())
    for x in jax.tree.leaves(tree):
        if isinstance(x, Tracer):
            with contextlib.suppress(_SeenError):
                _seen.bind(x, names=names.update)
    return names


class _SeenError(Exception):
    """Ends the inspection of an array, so that it adds nothing to the program."""


def _end(*_, names):
    raise _SeenError


def _look_at_vmap(axis_data, operands, dims, *, names):
    names(axis_data.spmd_name or ())
    return _seen.bind(*operands, names=names), dims[0]


# Passes through all transformations around a tracer, and asks each `vmap` for its axis. JAX raises
# if an axis is used twice, and has no other way to find it.
_seen = Primitive("dpo_eqx_seen")
_seen.def_abstract_eval(_end)
_seen.def_impl(_end)
ad.deflinear2(_seen, _end)
batching.fancy_primitive_batchers[_seen] = _look_at_vmap
