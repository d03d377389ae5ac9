"""Names of the parameters in a pytree, for tables, patterns and messages."""

from typing import Any

import jax


def leaf_name(path: Any) -> str:
    """The path of a leaf as text, such as `layers.attention.query.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
