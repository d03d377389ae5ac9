"""Which arrays of a policy are trained, by regular expressions on their paths.

A step takes the result as `trainable=`; nothing here trains.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._jax.paths import leaf_name

Patterns = str | Sequence[str]


def trainable(
    policy: PyTree, *, only: Patterns | None = None, without: Patterns | None = None
) -> PyTree:
    r"""Selects the arrays to train by regular expressions on their paths, for `trainable=`.

    ```python
    trainable = dpx.trainable(policy, only=r"^layers\.(10|11)\.", without=r"inv_freq$")
    step = dpx.make_step(loss, optimizer, trainable=trainable)
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    ```

    A pattern matches if it occurs anywhere in a path such as `layers.0.attention.query.weight`, as
    in the rules of `dpx.sharding`.

    **Arguments:**

    - `policy`: a policy, or any pytree.
    - `only`: one pattern or several; only arrays that match one of them are selected (default: all
        floating-point arrays, complex ones included).
    - `without`: one pattern or several; arrays that match one of them are not selected.

    **Returns:**

    A pytree like `policy` of bools.

    **Raises:**

    `ValueError` if a pattern matches no floating-point array, or if nothing is left to train.
    """
    paths = [
        leaf_name(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(policy)
        if eqx.is_inexact_array(leaf)
    ]
    kept, left_out = _compiled("only", only, paths), _compiled("without", without, paths)

    def is_selected(path: Any, leaf: Any) -> bool:
        name = leaf_name(path)
        wanted = only is None or any(pattern.search(name) for pattern in kept)
        refused = any(pattern.search(name) for pattern in left_out)
        return eqx.is_inexact_array(leaf) and wanted and not refused

    selected = jax.tree_util.tree_map_with_path(is_selected, policy)
    if not any(jax.tree.leaves(selected)):
        raise ValueError(
            "`only` and `without` must leave at least one floating-point array to train; got "
            f"only={only!r} and without={without!r}, which leave none of {len(paths)}."
        )
    return selected


def _compiled(name: str, patterns: Patterns | None, paths: list[str]) -> list[re.Pattern[str]]:
    """The patterns, each of which matches one of `paths`."""
    listed = [patterns] if isinstance(patterns, str) else list(patterns or ())
    compiled = [re.compile(pattern) for pattern in listed]
    for pattern in compiled:
        if not any(map(pattern.search, paths)):
            near = difflib.get_close_matches(pattern.pattern.strip("^$"), paths, n=3, cutoff=0)
            raise ValueError(
                f"`{name}` must match the path of at least one floating-point array; got "
                f"{pattern.pattern!r}, which matches none of {len(paths)}. Paths near to it: "
                f"{', '.join(near)}."
            )
    return compiled
