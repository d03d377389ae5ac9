"""How the parameters of a pytree are named, for tables, patterns and messages."""

from typing import Any

import jax


def leaf_name(path: Any) -> str:
    """A leaf's path as `layers.attention.query.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
