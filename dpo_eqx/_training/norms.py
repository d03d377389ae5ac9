"""Norms of gradients and updates by groups of parameters, such as attention and embedding.

Which parameters make a group is a function of their names. `step.py` asks for the norms.
"""

from collections.abc import Callable

import jax
import optax
from jaxtyping import Array, Float, PyTree

from .._jax.paths import leaf_name

GroupOf = Callable[[str], str]

_CONTAINERS = ("layers", "blocks", "body")


def parameter_group(name: str) -> str:
    """The group of a parameter of a decoder, for `group_norms` and `make_step(group_of=...)`.

    All norms are the group `norms`. The group of any other parameter is the first part of its name
    that is neither a number nor a container (`layers`, `blocks`, `body`): `attention` for
    `layers.attention.query.weight`, `embedding` for `embedding.weight`.

    **Arguments:**

    - `name`: the path of the parameter in the policy, with dots.

    **Returns:**

    The name of the group. Write your own function of this form for a policy with other names.
    """
    parts = name.split(".")
    if any("norm" in part for part in parts):
        return "norms"
    own = [part for part in parts if part not in _CONTAINERS and not part.isdecimal()]
    return own[0] if own else name


def group_norms(
    tree: PyTree, *, group_of: GroupOf = parameter_group
) -> dict[str, Float[Array, ""]]:
    """The global norm of each group of arrays in a pytree of gradients or updates.

    **Arguments:**

    - `tree`: gradients from `make_grad`, updates of an optimiser, or parameters.
    - `group_of`: a function from the name of an array to the name of its group.

    **Returns:**

    By the name of the group, the square root of the sum of all squares in it, a scalar. The squares
    of these sum to the square of the norm of the whole tree.
    """
    groups: dict[str, list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        groups.setdefault(group_of(leaf_name(path)), []).append(leaf)
    return {name: optax.tree.norm(leaves) for name, leaves in sorted(groups.items())}
