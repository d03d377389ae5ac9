"""Finds linear layers in any Equinox module by their paths, and replaces them.

The caller passes the replacements: adapters or quantised layers.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..._jax.paths import leaf_name
from .._decoder.basic_layers import Linear
from .._decoder.experts import ExpertLinear, Router

Policy = TypeVar("Policy")


def is_plain_linear(node: Any) -> bool:
    """Whether `node` is a linear layer whose weight is a matrix, or one for each expert."""
    if isinstance(node, eqx.nn.Linear) and "scalar" in (node.in_features, node.out_features):
        return False
    return isinstance(node, eqx.nn.Linear | Linear | ExpertLinear) and node.weight is not None


def is_router(node: Any) -> bool:
    """Whether `node` is the router of a mixture of experts, with its weight."""
    return isinstance(node, Router) and node.weight is not None


def is_of_mixture(node: Any) -> bool:
    """Whether `node` is a linear layer of experts, quantised or not, or their router."""
    return isinstance(getattr(node, "layer", node), ExpertLinear | Router)


def linear_paths(
    policy: PyTree,
    target: str | None,
    is_linear: Callable[[Any], bool],
    *,
    is_default: Callable[[Any], bool] = lambda node: True,
) -> set[str]:
    """The paths of the linear layers that `target` selects.

    **Arguments:**

    - `policy`: any pytree with linear layers.
    - `target`: a regular expression, searched in the path of each layer's weight; `None` selects
        every linear layer but the unembedding.
    - `is_linear`: whether a node is a linear layer.
    - `is_default`: which linear layers `None` selects.

    **Raises:**

    `ValueError` if no layer matches; the error lists the candidates.
    """
    nodes = jax.tree_util.tree_leaves_with_path(policy, is_leaf=is_linear)
    layers = {leaf_name(path): node for path, node in nodes if is_linear(node)}
    if target is None:
        chosen = {name for name, node in layers.items() if is_default(node)}
        chosen -= {unembedding_of(policy)}
    else:
        chosen = {name for name in layers if re.search(target, _weight_of(name))}
    if not chosen:
        candidates = ", ".join(map(_weight_of, sorted(layers))) or "none"
        selection = "the default, all but the unembedding," if target is None else repr(target)
        raise ValueError(
            f"`target` must match the path of a linear layer's weight; {selection} matches none. "
            f"There are: {candidates}."
        )
    return chosen


def replace_at(
    policy: Policy,
    paths: set[str],
    is_linear: Callable[[Any], bool],
    function: Callable[[str, Any], Any],
) -> Policy:
    """The policy with each layer at `paths` replaced by `function(path, layer)`."""

    def replace(keys, node):
        path = leaf_name(keys)
        return function(path, node) if is_linear(node) and path in paths else node

    return jax.tree_util.tree_map_with_path(replace, policy, is_leaf=is_linear)


def unembedding_of(policy: PyTree) -> str | None:
    """The path of the layer that holds the policy's unembedding, or `None`."""
    weight = getattr(policy, "unembedding", None)
    nodes = jax.tree_util.tree_leaves_with_path(policy, is_leaf=is_plain_linear)
    return next(
        (
            leaf_name(path)
            for path, node in nodes
            if is_plain_linear(node) and node.weight is weight
        ),
        None,
    )


def _weight_of(name: str) -> str:
    # A policy that is itself one linear layer has an empty path.
    return f"{name}.weight" if name else "weight"
