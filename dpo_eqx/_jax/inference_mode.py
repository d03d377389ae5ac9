"""Switches dropout off: sets the flags `inference` of the Equinox layers in a policy."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Tree = TypeVar("Tree")


def in_inference(policy: Tree) -> Tree:
    """`policy` with every flag `inference` true; layers with dropout have such a flag.

    `eqx.nn.inference_mode` sets any attribute with this name, and fails if it is a method or a
    static field. Here a flag is a field that is a leaf of the pytree and holds a boolean. Methods,
    properties, static fields, `None`, modules and arrays of numbers are unchanged.
    """

    def switched(path: tuple[Any, ...], leaf: Any) -> Any:
        is_named = path[-1:] == (jax.tree_util.GetAttrKey("inference"),)
        return True if is_named and _is_flag(leaf) else leaf

    return jax.tree_util.tree_map_with_path(switched, policy)


def _is_flag(leaf: Any) -> bool:
    if isinstance(leaf, jax.Array | np.ndarray):
        return jnp.issubdtype(leaf.dtype, jnp.bool_)
    return isinstance(leaf, bool | np.bool_)
