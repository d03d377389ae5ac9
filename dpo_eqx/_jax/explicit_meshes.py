"""Meshes with explicit axes, as `jax.make_mesh` makes them: what runs under automatic ones there.

Without such a mesh nothing is done. Rows under automatic partitioning are in `partitioning.py`.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import Array, PyTree

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def automatic(
    function: Callable[Arguments, Returned], *, like: int = 0
) -> Callable[Arguments, Returned]:
    """`function` under automatic partitioning, on a mesh with explicit axes too.

    There JAX wants the sharding of each intermediate result to follow from the operands, which a
    gather, a sort or a loop does not give. What is returned is explicit again: the first axis of
    every array is split as that of the first array of parameter number `like`, if it divides, and
    all else is replicated. All arrays that `function` uses must be arguments of it.
    """

    @functools.wraps(function)
    def partitioned(*args: Arguments.args, **keywords: Arguments.kwargs) -> Returned:
        mesh = _explicit_mesh((args, keywords))
        if mesh is None:
            return function(*args, **keywords)
        given = inspect.signature(function).bind(*args, **keywords).arguments
        rows = _split_of_rows(list(given.values())[like], mesh)
        with jax.sharding.use_abstract_mesh(_all_automatic(mesh)):
            args, keywords = _reshard((args, keywords), lambda _: P())
            result = function(*args, **keywords)
        parts = math.prod(mesh.shape[name] for name in rows)

        def split(x):
            fits = x.ndim > 0 and x.shape[0] % parts == 0
            return NamedSharding(mesh, P(rows) if fits else P())

        return _reshard(result, split)

    return partitioned


def split_like(tree: PyTree, rows: Array | np.ndarray) -> PyTree:
    """The arrays of `tree` with their first axis split as that of `rows` explicitly is."""
    mesh = jax.typeof(rows).sharding.mesh
    here = NamedSharding(mesh, P(_split_of_rows(rows, mesh)))
    return _reshard(tree, lambda _: here) if mesh.explicit_axes else tree


def whole_unless_split(x: Array | np.ndarray, parts: int) -> Array | np.ndarray:
    """`x`, replicated if `parts` equal parts of it cannot be split as `x` explicitly is."""
    mesh = jax.typeof(x).sharding.mesh
    devices = math.prod(mesh.shape[name] for name in _split_of_rows(x, mesh))
    is_split = devices == 1 or x.shape[0] // parts % devices == 0
    return x if is_split else jax.sharding.reshard(x, NamedSharding(mesh, P()))


def _explicit_mesh(tree: PyTree) -> AbstractMesh | None:
    """The mesh with explicit axes on which arrays are computed here, if there is one."""
    context = jax.sharding.get_abstract_mesh()
    arrays = [] if not context.empty else filter(eqx.is_array, jax.tree.leaves(tree))
    meshes = [context, *(jax.typeof(x).sharding.mesh for x in arrays)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _all_automatic(mesh: AbstractMesh) -> AbstractMesh:
    return mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))


def _split_of_rows(tree: PyTree, mesh: AbstractMesh) -> tuple[str, ...]:
    """The explicit axes over which the first axis of the first array of `tree` is split."""
    arrays = [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    spec = jax.typeof(arrays[0]).sharding.spec if arrays else P()
    first = spec[0] if len(spec) else None
    names = first if isinstance(first, tuple) else () if first is None else (first,)
    return tuple(name for name in names if name in mesh.explicit_axes)


def _reshard(tree: PyTree, sharding_of: Callable[[Array], P | NamedSharding]) -> PyTree:
    return jax.tree.map(
        lambda x: jax.sharding.reshard(x, sharding_of(x)) if eqx.is_array(x) else x, tree
    )
