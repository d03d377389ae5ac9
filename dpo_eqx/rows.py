"""Rows kept on their devices under automatic partitioning, as the types of the arrays tell it.

No function takes a mesh; where there is none, or one of other axes than `dpo_eqx.sharding` makes,
nothing is done. What is mapped by `shard_map` or `pmap` is in `axis.py`.
"""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PyTree

from .axis import vary
from .log_probs import at_least_float32

# The axes over which the rows of a batch are split, together; and all. The last varies fastest over
# the devices, so that it stays within a host where it can.
ROWS = ("data", "fsdp")
AXES = (*ROWS, "tensor")


def row_axes(x: Array | np.ndarray) -> tuple[str, ...] | None:
    """The axes over which the rows of `x`, its first axis, are split, for `vmap(spmd_axis_name=)`.

    `None` where there is no mesh, or where they do not divide the rows.
    """
    mesh = mesh_of(x)
    if mesh is None or x.shape[0] % math.prod(mesh.shape[name] for name in _rows_in(mesh)):
        return None
    return _rows_in(mesh) or None


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
    if parts == 1 or rows[0].shape[0] % parts:
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


def _rows_in(mesh: AbstractMesh) -> tuple[str, ...]:
    return tuple(name for name in ROWS if name in mesh.axis_names)
