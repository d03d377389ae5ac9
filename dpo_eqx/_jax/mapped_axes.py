"""Mapped axes of `shard_map` and `pmap`: marking, summing and gathering values over them.

Meshes and shardings are not here: inside the core an axis is only a name, or several.
"""

from collections.abc import Hashable
from typing import TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Tree = TypeVar("Tree")
AxisName = Hashable  # the name of one mapped axis, or a tuple of several


def vary(tree: Tree, axis_name: AxisName | None) -> Tree:
    """Marks every array in `tree` as varying over the axis; the values stay.

    Under `shard_map` the gradient with respect to a value that does *not* vary is already summed
    over the axis, by the transpose of this very cast where JAX inserts it. Casting first, outside
    the differentiated function, leaves the sum to the caller, as under `pmap`.

    **Raises:**

    `ValueError` if nothing binds a name, or if it is that of an axis of `vmap`, which has no
    replicated parameters to sum over. Under `jit` the second is raised when the program is lowered:
    `eqx.filter_pmap` finds the shapes of what it maps under such a `vmap`, which must trace.
    """
    names = frozenset(_names(axis_name))
    over_devices = names & set(jax.sharding.get_abstract_mesh().manual_axes)
    tree = _vary(tree, over_devices)
    for name in names - over_devices:
        _check_bound(name)
        tree = jax.tree.map(lambda x, n=name: _refuse(x, n) if _is_any_array(x) else x, tree)
    return tree


def vary_alike(*trees):
    """Marks all arrays in all `trees` as varying over every axis that any of them varies over."""
    arrays = [leaf for leaf in jax.tree.leaves(trees) if eqx.is_array(leaf)]
    return _vary(trees, frozenset().union(*map(varying_axes, arrays)))


def varying_axes(x: Array | np.ndarray) -> frozenset[Hashable]:
    """The mapped axes over which `x` is known to vary.

    Empty outside `shard_map`, under `pmap`, and under `shard_map(..., check_vma=False)`, which
    track nothing.
    """
    return jax.typeof(x).manual_axis_type.varying


def total(tree: Tree, axis_name: AxisName | None) -> Tree:
    """The sum over the axis, the same on every device."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def gather(tree: Tree, axis_name: AxisName | None) -> Tree:
    """The rows of all devices in the order of the axis, on every device."""
    if axis_name is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), tree)


def own_rows(tree: Tree, axis_name: AxisName | None, rows: int) -> Tree:
    """This device's `rows` of what `gather` gave."""
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


def _is_any_array(x) -> bool:
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


# The identity, which traces and neither runs nor is lowered. Whether a `vmap` will only give shapes
# cannot be seen while it traces.
_over_vmap = Primitive("dpo_eqx_over_vmap")
_over_vmap.def_abstract_eval(lambda x, **_: x)
_over_vmap.def_impl(_raise_of_vmap)
mlir.register_lowering(_over_vmap, _raise_of_vmap)
batching.defvectorized(_over_vmap)
ad.deflinear2(_over_vmap, lambda cotangent, _, axis_name: [_refuse(cotangent, axis_name)])
