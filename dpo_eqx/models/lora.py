"""Low-rank adapters for the linear layers of any Equinox module, by tree surgery.

What is trained is chosen by `lora_filter`; the step itself knows nothing of adapters.
"""

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..log_probs import at_least_float32
from .paths import leaf_name
from .pieces import Linear

Policy = TypeVar("Policy")


class LoRA(eqx.Module):
    r"""A linear layer with a low-rank term beside its weight: $W + s\,B A$.

    It is called as the layer is. Several layers stacked along leading axes have adapters stacked
    in the same way.

    **Arguments:**

    - `base`: the layer; frozen by `lora_filter`.
    - `down`: $A$. Shape `(*layers, rank, in)`.
    - `up`: $B$. Shape `(*layers, out, rank)`.
    - `scale`: $s$, `alpha / rank`.
    """

    base: Any
    down: Float[Array, "*layers rank in"]
    up: Float[Array, "*layers out rank"]
    scale: float = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "*batch in"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out"]:
        low = x @ self.down.astype(x.dtype).T
        return self.base(x) + self.scale * (low @ self.up.astype(x.dtype).T)

    @property
    def weight(self) -> Float[Array, "*layers out in"]:
        """The weight that the layer and its adapter are together, in the layer's dtype."""
        dtype = self.base.weight.dtype
        wide = at_least_float32(dtype)
        term = self.up.astype(wide) @ self.down.astype(wide)
        return (self.base.weight.astype(wide) + self.scale * term).astype(dtype)

    @property
    def bias(self) -> Array | None:
        """The layer's own."""
        return self.base.bias


def add_lora(
    policy: Policy,
    *,
    rank: int,
    alpha: float | int | None = None,
    target: str | None = None,
    key: PRNGKeyArray,
) -> Policy:
    r"""Puts a low-rank adapter beside linear layers of any Equinox module.

    ```python
    policy = models.add_lora(policy, rank=16, key=key)
    trainable = models.lora_filter(policy)
    step = dpx.make_step(loss, optimizer, trainable=trainable, reference_of=models.without_lora)
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    ```

    $A$ starts uniform in $\pm 1/\sqrt{in}$ and $B$ at zero, so that the policy is at first exactly
    its base, which is the reference. Adapters are float32 or wider whatever the base is.

    **Arguments:**

    - `policy`: holds layers of ours or `eqx.nn.Linear`, stacked along leading axes or not.
    - `rank`: of the adapters.
    - `alpha`: the term is scaled by `alpha / rank`; by default `2 * rank`. For rank-stabilised
        adapters give `alpha * rank ** 0.5`.
    - `target`: a regular expression, searched in the path of each layer's weight as
        `jax.tree_util.keystr(path, simple=True, separator=".")` writes it, such as
        `"layers.attention.query.weight"`. By default every linear layer but the unembedding.
    - `key`: for $A$.

    **Raises:**

    `ValueError` where `target` matches no linear layer (listing those it could match), `rank` or
    `alpha` is not positive, or `policy` has adapters already.

    ??? cite

        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021 (arXiv 2106.09685).
    """
    _check_positive(rank=rank, alpha=alpha)
    if adapters(policy):
        raise ValueError("`policy` has adapters already; merge them first, with `merge_lora`.")
    chosen = _targets(policy, target)
    scale = (2 * rank if alpha is None else alpha) / rank
    keys = iter(jax.random.split(key, len(chosen)))

    def adapt(path, node):
        if not is_linear(node) or leaf_name(path) not in chosen:
            return node
        return _adapter(node, rank, scale, next(keys))

    return jax.tree_util.tree_map_with_path(adapt, policy, is_leaf=is_linear)


def lora_filter(policy: PyTree) -> PyTree:
    """True at the adapters and false elsewhere, for `trainable=` and `eqx.filter`.

    **Raises:**

    `ValueError` where `policy` has no adapters.
    """
    if not adapters(policy):
        raise ValueError("`policy` has no adapters to select; add them with `add_lora`.")

    def select(node):
        nothing = jax.tree.map(lambda _: False, node)
        if not isinstance(node, LoRA):
            return nothing
        return eqx.tree_at(lambda lora: (lora.down, lora.up), nothing, (True, True))

    return jax.tree.map(select, policy, is_leaf=_is_lora)


def without_lora(policy: Policy) -> Policy:
    """The policy without its adapters: the base itself, not a copy.

    For `reference_of=`, where the base is the reference at no memory.
    """
    return _replace(policy, lambda lora: lora.base)


def merge_lora(policy: Policy) -> Policy:
    """The policy with its adapters added into the weights, rounded to the weights' dtype."""

    def merge(lora: LoRA):
        return eqx.tree_at(lambda layer: layer.weight, lora.base, lora.weight)

    return _replace(policy, merge)


def adapters(policy: PyTree) -> list[LoRA]:
    """All adapters of a policy."""
    return [node for node in jax.tree.leaves(policy, is_leaf=_is_lora) if _is_lora(node)]


def is_linear(node: Any) -> bool:
    """Whether `node` is a linear layer that can have an adapter."""
    if isinstance(node, eqx.nn.Linear):
        return "scalar" not in (node.in_features, node.out_features)
    return isinstance(node, Linear)


def _is_lora(node: Any) -> bool:
    return isinstance(node, LoRA)


def _replace(policy: Policy, function: Callable[[LoRA], Any]) -> Policy:
    return jax.tree.map(
        lambda node: function(node) if isinstance(node, LoRA) else node, policy, is_leaf=_is_lora
    )


def _targets(policy: PyTree, target: str | None) -> set[str]:
    """The paths of the layers that get an adapter."""
    nodes = jax.tree_util.tree_leaves_with_path(policy, is_leaf=is_linear)
    layers = {leaf_name(path): node for path, node in nodes if is_linear(node)}
    if target is None:
        unembedding = getattr(policy, "unembedding", None)
        chosen = {name for name, node in layers.items() if node.weight is not unembedding}
    else:
        chosen = {name for name in layers if re.search(target, _weight_of(name))}
    if not chosen:
        candidates = ", ".join(map(_weight_of, sorted(layers))) or "none"
        raise ValueError(
            f"`target` must match the path of a linear layer's weight; {target!r} matches none. "
            f"There are: {candidates}."
        )
    return chosen


def _weight_of(name: str) -> str:
    # A policy that is itself one linear layer has an empty path.
    return f"{name}.weight" if name else "weight"


def _adapter(layer: Any, rank: int, scale: float, key: PRNGKeyArray) -> LoRA:
    *lead, out, width = layer.weight.shape
    dtype = at_least_float32(layer.weight.dtype)
    bound = 1 / math.sqrt(width)
    down = jax.random.uniform(key, (*lead, rank, width), dtype, -bound, bound)
    return LoRA(layer, down, jnp.zeros((*lead, out, rank), dtype), scale)


def _check_positive(**values: float | int | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
