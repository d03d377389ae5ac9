"""Dtypes of a policy: what it computes in, and what gradients and optimisers are held in."""

from collections.abc import Callable
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from .log_probs import at_least_float32

Tree = TypeVar("Tree")


def in_dtype(tree: Tree, dtype: DTypeLike | None) -> Tree:
    """The floating-point arrays of `tree` cast to `dtype`; `None` leaves them."""
    return tree if dtype is None else _map_floats(lambda x: x.astype(dtype), tree)


def in_float32_at_least(tree: Tree) -> Tree:
    """The floating-point arrays of `tree` in float32 where they were narrower."""
    return _map_floats(lambda x: x.astype(at_least_float32(x.dtype)), tree)


def in_dtypes_of(tree: Tree, like: Tree) -> Tree:
    """Every array of `tree` in the dtype of its counterpart in `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if eqx.is_array(y) else x, tree, like)


def is_narrow(tree: object) -> bool:
    """Whether `tree` holds floating-point arrays narrower than float32."""
    floats = filter(eqx.is_inexact_array, jax.tree.leaves(tree))
    return any(jnp.finfo(x.dtype).bits < 32 for x in floats)


def _map_floats(function: Callable, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: function(x) if eqx.is_inexact_array(x) else x, tree)
