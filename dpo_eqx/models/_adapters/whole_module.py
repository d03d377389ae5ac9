"""A module that is trained as a whole beside adapters, with its original for the reference.

`lora.py` puts it into a policy and takes it out again.
"""

import dataclasses
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..._jax.dtypes import in_dtypes_of, in_float32_at_least
from ..._jax.paths import leaf_name
from .._decoder.basic_layers import Embedding, Norm
from .linear_layers import is_plain_linear

_NORMS = eqx.nn.LayerNorm | eqx.nn.RMSNorm | eqx.nn.GroupNorm
_KINDS = Embedding | Norm | eqx.nn.Embedding | _NORMS


class WholeModule(eqx.Module):
    """An embedding, a norm or an unstacked linear layer of which all parameters are trained.

    It is called like the module.

    **Arguments:**

    - `module`: the trained copy, in float32 or wider; `lora_filter` selects it.
    - `original`: the module as it was, which is frozen.
    - `pinned`: the copy of the trained arrays that `pin_lora` stored, or `None`.
    """

    module: Any
    original: Any
    pinned: tuple[Array, ...] | None = None

    @staticmethod
    def of(original: Any) -> "WholeModule":
        """A module that is still its original."""
        # A copy, since a buffer that is shared cannot be donated.
        copy = jax.tree.map(lambda x: jnp.array(x, copy=True) if eqx.is_array(x) else x, original)
        return WholeModule(in_float32_at_least(copy), original)

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        return self.module(x)

    @property
    def weight(self) -> Array:
        """The trained weight."""
        return self.module.weight

    @property
    def bias(self) -> Array | None:
        """The trained bias, if the module has one."""
        return getattr(self.module, "bias", None)

    @property
    def base(self) -> Any:
        """The module as it was."""
        return self.original

    @property
    def trained(self) -> tuple[Any, ...]:
        """What `lora_filter` selects: arrays, or what a pytree like this one has in their place."""
        return tuple(jax.tree.leaves(self.module))

    def with_trained(self, trained: tuple[Any, ...]) -> "WholeModule":
        """The same module with other arrays as `trained`."""
        module = jax.tree.unflatten(jax.tree.structure(self.module), trained)
        return dataclasses.replace(self, module=module)

    def merged(self) -> Any:
        """The trained module, in the dtypes of its original."""
        return in_dtypes_of(self.module, self.original)


def module_paths(policy: PyTree, pattern: str) -> set[str]:
    """The paths of the modules that can be trained whole and that a pattern selects.

    **Arguments:**

    - `pattern`: a regular expression, searched in the path of each module's weight.

    **Raises:**

    `ValueError` if no module matches; the error lists the candidates.
    """
    candidates = whole_modules(policy)
    chosen = {path for path in candidates if re.search(pattern, f"{path}.weight".lstrip("."))}
    if not chosen:
        raise ValueError(
            "`modules_to_save` must match the path of the weight of an embedding, a norm or a "
            f"linear layer outside of stacks; {pattern!r} matches none. There are: "
            f"{', '.join(f'{path}.weight' for path in sorted(candidates)) or 'none'}."
        )
    return chosen


def whole_modules(policy: PyTree) -> dict[str, Any]:
    """The modules that can be trained whole, by their paths."""
    nodes = jax.tree_util.tree_leaves_with_path(policy, is_leaf=can_be_whole)
    return {leaf_name(path): node for path, node in nodes if can_be_whole(node)}


def can_be_whole(node: Any) -> bool:
    """Whether a node is an embedding, a norm or an unstacked linear layer with a weight."""
    if isinstance(node, _KINDS):
        return node.weight is not None
    # The linear layers of a stack may be parts of one layer of a checkpoint; they get adapters.
    return is_plain_linear(node) and node.weight.ndim == 2
