"""Mapped axes of `shard_map` and `pmap`: marking, summing and gathering values over them.

Meshes and shardings are not here: in the core, an axis is a name or a tuple of names.
"""

from collections.abc import Hashable
from typing import Any, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

Tree = TypeVar("Tree")
AxisName = Hashable  # the name of one mapped axis, or a tuple of several


def vary(tree: Tree, axis_name: AxisName | None) -> Tree:
    """Marks every array in `tree` as varying over the axis; the values do not change.

    Under `shard_map`, the gradient with respect to a value that does *not* vary is already summed
    over the axis: JAX inserts the same cast, and its transpose is a sum. Casting first, outside the
    differentiated function, leaves the sum to the caller, as under `pmap`.

    **Raises:**

    `ValueError` if no transformation binds a name, or if it names an axis of `vmap`, which has no
    replicated parameters to sum over. Under `jit`, the second error is raised only when the program
    is lowered, because `eqx.filter_pmap` traces its function under such a `vmap` to find shapes.
    """
    names = frozenset(_names(axis_name))
    over_devices = names & set(jax.sharding.get_abstract_mesh().manual_axes)
    tree = _vary(tree, over_devices)
    for name in names - over_devices:
        _check_bound(name)
        tree = jax.tree.map(lambda x, n=name: _refuse(x, n) if _is_any_array(x) else x, tree)
    return tree


def vary_alike(*trees: PyTree) -> Any:
    """Marks all arrays in all `trees` as varying over every axis that any of them varies over."""
    arrays = [leaf for leaf in jax.tree.leaves(trees) if eqx.is_array(leaf)]
    return _vary(trees, frozenset().union(*map(varying_axes, arrays)))


def varying_axes(x: Array | np.ndarray) -> frozenset[Hashable]:
    """The mapped axes over which `x` is known to vary.

    Empty outside `shard_map`, and under `pmap` and `shard_map(..., check_vma=False)`, which do not
    track it.
    """
    return jax.typeof(x).manual_axis_type.varying


def total(tree: Tree, axis_name: AxisName | None) -> Tree:
    """The sum over the axis, the same on every device."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def gather(tree: Tree, axis_name: AxisName | None) -> Tree:
    """All-gathers the rows of all devices, in the order of the axis, onto every device."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree)


def own_rows(tree: Tree, axis_name: AxisName | None, rows: int) -> Tree:
    """The `rows` of the result of `gather` that belong to this device."""
    if axis_name is None:
        return tree
    first = jax.lax.axis_index(axis_name) * rows
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, rows), tree)


def _names(axis_name: AxisName | None) -> tuple[Hashable, ...]:
    if axis_name is None:
        return ()
    return axis_name if isinstance(axis_name, tuple) else (axis_name,)


def _vary(tree: Tree, axes: frozenset[Hashable]) -> Tree:
    def cast(leaf):
        missing = tuple(axes - varying_axes(leaf)) if eqx.is_array(leaf) else ()
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _is_any_array(x: object) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _check_bound(axis_name: Hashable) -> None:
    try:
        jax.lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"`axis_name` must name an axis of `shard_map` or `pmap`, got {axis_name!r}, which "
            "neither of them binds here. Call the step inside one of them, or make it without "
            "`axis_name`."
        ) from error


def _raise_of_vmap(*_, axis_name: Hashable):
    raise ValueError(
        f"`axis_name` must name an axis of `shard_map` or `pmap`, got {axis_name!r}, an axis of "
        "`vmap`. Call the step without `axis_name` there: `vmap` makes one step for each entry."
    )


def _refuse(x: Array, axis_name: Hashable) -> Array:
    return _over_vmap.bind(x, axis_name=axis_name)


# The identity, which can be traced, but raises when it runs or is lowered. While a `vmap` traces,
# it is unknown whether only the shapes of its results will be used.
_over_vmap = Primitive("dpo_eqx_over_vmap")
_over_vmap.def_abstract_eval(lambda x, **_: x)
_over_vmap.def_impl(_raise_of_vmap)
mlir.register_lowering(_over_vmap, _raise_of_vmap)
batching.defvectorized(_over_vmap)
ad.deflinear2(_over_vmap, lambda cotangent, _, axis_name: [_refuse(cotangent, axis_name)])
