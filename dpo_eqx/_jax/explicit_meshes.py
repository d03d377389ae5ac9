"""Runs functions under automatic partitioning on meshes with explicit axes.

`jax.make_mesh` makes such meshes by default; on other meshes, nothing here has an effect.
`partitioning.py` handles rows under automatic partitioning.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

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
    """`function` under automatic partitioning, even on a mesh with explicit axes.

    With explicit axes, JAX requires that the sharding of each intermediate result follows from the
    operands. That is not so for a gather, a sort or a loop. The result has explicit axes again: the
    first axis of every array is sharded as the first axis of the first array in parameter number
    `like`, if it divides. Everything else is replicated. All arrays that `function` uses must be
    its arguments, not in a closure.
    """

    @functools.wraps(function)
    def partitioned(*args: Arguments.args, **keywords: Arguments.kwargs) -> Returned:
        mesh = _explicit_mesh((args, keywords))
        if mesh is None:
            return function(*args, **keywords)
        arguments = inspect.signature(function).bind(*args, **keywords).arguments
        rows = _split_of_rows(list(arguments.values())[like], mesh)
        with jax.sharding.use_abstract_mesh(_all_automatic(mesh)):
            args, keywords = _reshard((args, keywords), lambda _: P())
            result = function(*args, **keywords)
        parts = math.prod(mesh.shape[name] for name in rows)

        def split(x: Array) -> NamedSharding:
            fits = x.ndim > 0 and x.shape[0] % parts == 0
            return NamedSharding(mesh, P(rows) if fits else P())

        return _reshard(result, split)

    return partitioned


def split_like(tree: PyTree, rows: Array | np.ndarray) -> PyTree:
    """`tree` with the first axis of its arrays sharded over the explicit axes of `rows`."""
    mesh = jax.typeof(rows).sharding.mesh
    here = NamedSharding(mesh, P(_split_of_rows(rows, mesh)))
    return _reshard(tree, lambda _: here) if mesh.explicit_axes else tree


# `parts` may be symbolic, as in `jax.export`.
def whole_unless_split(x: Array | np.ndarray, parts: Any) -> Array | np.ndarray:
    """`x`, replicated if its sharding would not divide one of `parts` equal parts of it."""
    mesh = jax.typeof(x).sharding.mesh
    devices = math.prod(mesh.shape[name] for name in _split_of_rows(x, mesh))
    is_split = devices == 1 or x.shape[0] // parts % devices == 0
    return x if is_split else jax.sharding.reshard(x, NamedSharding(mesh, P()))


def _explicit_mesh(tree: PyTree) -> AbstractMesh | None:
    """The mesh with explicit axes on which arrays are computed here, or `None`."""
    context = jax.sharding.get_abstract_mesh()
    arrays = [] if not context.empty else filter(eqx.is_array, jax.tree.leaves(tree))
    meshes = [context, *(jax.typeof(x).sharding.mesh for x in arrays)]
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def _all_automatic(mesh: AbstractMesh) -> AbstractMesh:
    return mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))


def _split_of_rows(tree: PyTree, mesh: AbstractMesh) -> tuple[str, ...]:
    """The explicit axes over which the first axis of the first array of `tree` is sharded."""
    arrays = [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    spec = jax.typeof(arrays[0]).sharding.spec if arrays else P()
    first = spec[0] if len(spec) else None
    names = first if isinstance(first, tuple) else () if first is None else (first,)
    return tuple(name for name in names if name in mesh.explicit_axes)


def _reshard(tree: PyTree, sharding_of: Callable[[Array], P | NamedSharding]) -> PyTree:
    return jax.tree.map(
        lambda x: jax.sharding.reshard(x, sharding_of(x)) if eqx.is_array(x) else x, tree
    )
