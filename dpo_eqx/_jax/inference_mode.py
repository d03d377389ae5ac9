"""Policies without dropout: the flags by which Equinox's layers know that they do not train."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Tree = TypeVar("Tree")


def in_inference(policy: Tree) -> Tree:
    """`policy` with every flag `inference` true, as its layers with dropout have one.

    `eqx.nn.inference_mode` sets whatever attribute has this name, and fails at a method or at a
    static field. Here a flag is a field that JAX sees, and that holds a boolean. Methods,
    properties, static fields, `None`, modules and arrays of numbers are left alone.
    """

    def switched(path: tuple[Any, ...], leaf: Any) -> Any:
        is_named = path[-1:] == (jax.tree_util.GetAttrKey("inference"),)
        return True if is_named and _is_flag(leaf) else leaf

    return jax.tree_util.tree_map_with_path(switched, policy)


def _is_flag(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array | np.ndarray):
        return jnp.issubdtype(leaf.dtype, jnp.bool_)
    return isinstance(leaf, bool | np.bool_)
