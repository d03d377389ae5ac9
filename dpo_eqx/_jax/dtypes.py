"""Dtypes of a policy's computation, and of gradients and optimiser states."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike

Tree = TypeVar("Tree")


def in_dtype(tree: Tree, dtype: DTypeLike | None) -> Tree:
    """`tree` with its floating-point arrays cast to `dtype`, or unchanged if `dtype` is `None`.

    Complex arrays stay complex. Their parts are in `dtype`, but at least in float32, because there
    is no complex bfloat16.
    """
    return tree if dtype is None else _map_floats(lambda x: cast(x, dtype), tree)


def in_float32_at_least(tree: Tree) -> Tree:
    """`tree` with all floating-point arrays that are narrower than float32 cast to float32."""
    return _map_floats(lambda x: x.astype(at_least_float32(x.dtype)), tree)


def in_dtypes_of(tree: Tree, like: Tree) -> Tree:
    """`tree` with every array cast to the dtype of its counterpart in `like`; see `cast`."""
    return jax.tree.map(lambda x, y: cast(x, y.dtype) if eqx.is_array(y) else x, tree, like)


def cast(x: Array, dtype: Any) -> Array:
    """`x` in `dtype`, or in the nearest complex dtype if `x` is complex and `dtype` is real."""
    # Returns random keys, too, before `issubdtype`: their dtype is not a number's.
    if x.dtype == dtype:
        return x
    if jnp.issubdtype(x.dtype, jnp.complexfloating) and not jnp.issubdtype(
        dtype, jnp.complexfloating
    ):
        dtype = jnp.complex128 if jnp.finfo(dtype).bits > 32 else jnp.complex64
    return x.astype(dtype)


def is_narrow(tree: object) -> bool:
    """Whether `tree` holds floating-point arrays narrower than float32."""
    floats = filter(eqx.is_inexact_array, jax.tree.leaves(tree))
    return any(jnp.finfo(x.dtype).bits < 32 for x in floats)


def _map_floats(function: Callable, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: function(x) if eqx.is_inexact_array(x) else x, tree)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """`dtype` if it is float32 or wider, else float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
