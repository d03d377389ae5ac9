"""The weighted sum, for each token, of what some of many groups of parameters make of it.

On a mesh with the axis `expert`, each device along it has some of the groups. A `vmap` merges the
tokens of all examples, and `routed_passes.py` has the work of one device. Nothing here knows what
the groups are.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from .dtypes import at_least_float32
from .mapped_axes import vary
from .partitioning import EXPERT, mesh_of, taken_axes
from .routed_passes import Function, Rows, sum_over_devices


def routed_sum(
    function: Callable[[Float[Array, "rows width"], Int[Array, " rows"], Any], Array],
    x: Float[Array, "length width"],
    chosen: Int[Array, "length chosen"],
    weights: Float[Array, "length chosen"],
    groups: Any,
) -> Float[Array, "length width"]:
    r"""$\sum_k w_{ik} f(x_i, g_{ik})$ for each token $i$, with the groups $g$ and the weights $w$.

    On a mesh whose axis `expert` divides the groups, no parameter is gathered along that axis. It
    then has reverse mode, but not forward mode.

    **Arguments:**

    - `function`: $f$ for many rows: `(rows, group, groups) -> rows`. No row depends on another row.
        On such a mesh it gets the groups of one device. A row whose group is not below their number
        belongs to another device, and its result has no effect.
    - `x`, `chosen`, `weights`: the tokens, $g$ and $w$.
    - `groups`: a pytree of arrays whose first axis is the groups.
    """
    arrays, static = eqx.partition(groups, eqx.is_array)
    leaves, tree = jax.tree.flatten(arrays)

    def run(rows: Array, group: Array, arrays: PyTree) -> Array:
        return function(rows, group, eqx.combine(arrays, static))

    mesh = next(filter(None, map(mesh_of, (x, *leaves))), None)
    parts = 1 if mesh is None else mesh.shape.get(EXPERT, 1)
    if parts == 1 or leaves[0].shape[0] % parts:
        return _alone(run, (x, chosen, weights), arrays)
    return _routed.bind(x, chosen, weights, *leaves, run=run, tree=tree, mesh=mesh)


def _alone(run: Function, rows: Rows, groups: PyTree) -> Float[Array, "length width"]:
    """The sums where every device has all groups, or XLA gathers them."""
    x, chosen, weights = rows
    length, count = chosen.shape
    copies = jnp.broadcast_to(x[:, None], (length, count, x.shape[1])).reshape(-1, x.shape[1])
    y = run(copies, chosen.reshape(-1), groups).reshape(length, count, -1)
    return (weights[..., None] * y.astype(weights.dtype)).sum(axis=1).astype(x.dtype)


def _over_mesh(
    names: tuple[str, ...], mesh: AbstractMesh, run: Function, rows: Rows, groups: PyTree
) -> Float[Array, "examples length width"]:
    """The sums for examples that are split over the axes `names`."""
    dtypes = jax.tree.map(lambda x: x.dtype, groups)

    def on_device(rows: Rows, groups: PyTree) -> Array:
        groups = vary(groups, (*names, EXPERT))
        groups = jax.tree.map(lambda x, dtype: x.astype(dtype), groups, dtypes)
        x, chosen, weights = (x.reshape(-1, *x.shape[2:]) for x in rows)
        sums = sum_over_devices(run, EXPERT in names, (x, chosen, weights), groups)
        return sums.reshape(rows[0].shape)

    # As in `over_axes`, so that the gradient is summed over the other axes in float32.
    wide = jax.tree.map(
        lambda x: x.astype(at_least_float32(x.dtype)) if eqx.is_inexact_array(x) else x, groups
    )
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(names), P(EXPERT)),
        out_specs=P(names),
        axis_names={*names, EXPERT},
    )(rows, wide)


def _split(operands: Sequence[Array], tree: Any) -> tuple[Rows, PyTree]:
    """The operands of the primitive as tokens and groups."""
    x, chosen, weights, *leaves = operands
    return (x, chosen, weights), jax.tree.unflatten(tree, leaves)


def _run(*operands: Array, run: Function, tree: Any, mesh: AbstractMesh) -> Array:
    """Without a `vmap` over split rows, all devices have the same tokens."""
    rows, groups = _split(operands, tree)
    # JAX has no `shard_map` inside a `vmap` that splits over another axis of the mesh.
    if taken_axes(operands):
        return _alone(run, rows, groups)
    x, chosen, weights = (x[None] for x in rows)
    return _over_mesh((), mesh, run, (x, chosen, weights), groups)[0]


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    moving = [i for i, x in enumerate(tangents) if not isinstance(x, ad.Zero)]

    def of_moving(*moved):
        operands = list(primals)
        for i, x in zip(moving, moved, strict=True):
            operands[i] = x
        return _run(*operands, **params)

    return jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])


def _batch(axis: Any, operands: Any, dims: Any, **params: Any) -> tuple[Array, int | None]:
    """The tokens of all examples together."""
    if all(dim is None for dim in dims):
        return _routed.bind(*operands, **params), None
    run, tree, mesh = (params[name] for name in ("run", "tree", "mesh"))
    if any(dim is not None for dim in dims[3:]) or taken_axes(operands):
        return jax.vmap(lambda *operands: _alone(run, *_split(operands, tree)), dims)(*operands), 0
    rows = [
        jnp.broadcast_to(x, (axis.size, *x.shape)) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(operands[:3], dims[:3], strict=True)
    ]
    names = (axis.spmd_name,) if isinstance(axis.spmd_name, str) else axis.spmd_name
    if names:
        return _over_mesh(names, mesh, run, *_split((*rows, *operands[3:]), tree)), 0
    merged = (x.reshape(-1, *x.shape[2:]) for x in rows)
    return _routed.bind(*merged, *operands[3:], **params).reshape(rows[0].shape), 0


# A primitive, since a `vmap` must merge the tokens of its examples before they are gathered, and
# JAX's `custom_vmap` has no reverse mode.
_routed = Primitive("routed_sum")
_routed.def_impl(lambda *operands, **params: jax.jit(partial(_run, **params))(*operands))
_routed.def_abstract_eval(lambda x, *_, **__: x)
ad.primitive_jvps[_routed] = _jvp
batching.fancy_primitive_batchers[_routed] = _batch
mlir.register_lowering(_routed, mlir.lower_fun(_run, multiple_results=False))
