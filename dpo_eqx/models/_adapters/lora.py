"""Low-rank adapters for the linear layers of any Equinox module, by tree surgery.

`lora_filter` selects the adapters for training; the training step does not depend on them.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._jax.dtypes import at_least_float32
from ..._jax.paths import leaf_name
from ..._jax.rounding import rounded
from .linear_layers import is_plain_linear, linear_paths, replace_at
from .quantize import Quantized, dequantize, is_quantized

Policy = TypeVar("Policy")


class LoRA(eqx.Module):
    r"""A linear layer with a low-rank term added to its weight: $W + s\,B A$.

    It is called like the layer. Layers that are stacked along leading axes have adapters stacked
    in the same way.

    **Arguments:**

    - `base`: the linear layer, which `lora_filter` freezes.
    - `down`: $A$. Shape `(*layers, rank, in)`.
    - `up`: $B$. Shape `(*layers, out, rank)`.
    - `scale`: $s$, which is `alpha / rank`.
    - `pinned`: the copy of $A$ and $B$ that `pin_lora` stored, or `None`; `lora_filter` freezes it.
    """

    base: Any
    down: Float[Array, "*layers rank in"]
    up: Float[Array, "*layers out rank"]
    scale: float = eqx.field(static=True)
    pinned: tuple[Array, Array] | None = None

    def __call__(
        self, x: Float[Array, "*batch in"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out"]:
        low = rounded(x @ self.down.astype(x.dtype).T)
        return self.base(x) + self.scale * rounded(low @ self.up.astype(x.dtype).T)

    @property
    def weight(self) -> Float[Array, "*layers out in"]:
        r"""The weight of layer and adapter together, $W + s\,B A$, in the layer's dtype."""
        dtype = self.base.weight.dtype
        wide = at_least_float32(dtype)
        term = self.up.astype(wide) @ self.down.astype(wide)
        return (self.base.weight.astype(wide) + self.scale * term).astype(dtype)

    @property
    def bias(self) -> Array | None:
        """The bias of the layer."""
        return self.base.bias


def add_lora(
    policy: Policy,
    *,
    rank: int,
    alpha: float | int | None = None,
    target: str | None = None,
    key: PRNGKeyArray,
) -> Policy:
    r"""Adds low-rank adapters to linear layers of any Equinox module.

    ```python
    policy = models.add_lora(policy, rank=16, key=key)
    trainable = models.lora_filter(policy)
    step = dpx.make_step(loss, optimizer, trainable=trainable, reference_of=models.without_lora)
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    ```

    $A$ starts uniform in $\pm 1/\sqrt{in}$ and $B$ at zero, so that the policy first computes
    exactly what its base does, and the base is the reference. Adapters are float32 or wider,
    whatever the dtype of the base.

    **Arguments:**

    - `policy`: a pytree with linear layers, this library's or `eqx.nn.Linear`, stacked along
        leading axes or not, quantised or not.
    - `rank`: the rank of the adapters.
    - `alpha`: the term is scaled by `alpha / rank` (default: `2 * rank`). For rank-stabilised
        adapters give `alpha * rank ** 0.5`.
    - `target`: a regular expression, searched in the path of each layer's weight as
        `jax.tree_util.keystr(path, simple=True, separator=".")` writes it, such as
        `"layers.attention.query.weight"` (default: every linear layer but the unembedding).
    - `key`: the random key of the initial $A$.

    **Raises:**

    `ValueError` if `target` matches no linear layer (the error lists the candidates), if `rank` or
    `alpha` is not positive, or if `policy` already has adapters.

    ??? cite

        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021 (arXiv 2106.09685).
    """
    _check_positive(rank=rank, alpha=alpha)
    check_no_adapters(policy)
    paths = linear_paths(policy, target, is_linear)
    scale = (2 * rank if alpha is None else alpha) / rank
    keys = iter(jax.random.split(key, len(paths)))
    return replace_at(
        policy, paths, is_linear, lambda _, layer: _adapter(layer, rank, scale, next(keys))
    )


def lora_filter(policy: PyTree) -> PyTree:
    """True at the adapters and false elsewhere, for `trainable=` and `eqx.filter`.

    **Raises:**

    `ValueError` if `policy` has no adapters.
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

    Use it as `reference_of=` if the base is the reference, which then takes no memory. If the
    reference has adapters of its own, use `pin_lora` and `pinned_lora`.
    """
    return _replace(policy, lambda lora: lora.base)


def pin_lora(policy: Policy) -> Policy:
    """Stores a copy of the current adapters in the policy, for `pinned_lora`.

    ```python
    policy = models.pin_lora(models.load_lora(base, "adapter"))
    step = dpx.make_step(loss, optimizer, trainable=models.lora_filter(policy),
                         reference_of=models.pinned_lora)
    ```

    **Raises:**

    `ValueError` if `policy` has no adapters.
    """
    if not adapters(policy):
        raise ValueError("`policy` has no adapters to pin; add them with `add_lora`.")

    def pin(lora: LoRA) -> LoRA:
        # Copies, since a buffer that is shared cannot be donated.
        pinned = jnp.array(lora.down, copy=True), jnp.array(lora.up, copy=True)
        return LoRA(lora.base, lora.down, lora.up, lora.scale, pinned)

    return _replace(policy, pin)


def pinned_lora(policy: Policy) -> Policy:
    """The policy with the adapters that `pin_lora` stored.

    Use it as `reference_of=` if training continues from adapters and the policy with the initial
    adapters is the reference. The base is shared with the policy.

    **Raises:**

    `ValueError` if `policy` has no pinned adapters.
    """
    if not adapters(policy):
        raise ValueError("`policy` has no adapters; add them with `add_lora`.")

    def as_pinned(lora: LoRA) -> LoRA:
        if lora.pinned is None:
            raise ValueError("`policy` has adapters that are not pinned; pin them with `pin_lora`.")
        return LoRA(lora.base, *lora.pinned, lora.scale)

    return _replace(policy, as_pinned)


def merge_lora(policy: Policy) -> Policy:
    """The policy with its adapters added into the weights, rounded to the weights' dtype.

    All quantised weights are decoded first, also those without an adapter.
    """

    def merge(lora: LoRA):
        plain = dequantize(lora.base)
        return eqx.tree_at(lambda layer: layer.weight, plain, lora.weight)

    return dequantize(_replace(policy, merge))


def adapters(policy: PyTree) -> dict[str, LoRA]:
    """All adapters of a policy, by the path of their layer.

    **Raises:**

    `ValueError` if two layers have the same path, because a dictionary has a key with a dot.
    """
    nodes = jax.tree_util.tree_leaves_with_path(policy, is_leaf=_is_lora)
    pairs = [(leaf_name(path), node) for path, node in nodes if _is_lora(node)]
    by_path = dict(pairs)
    if len(by_path) < len(pairs):
        paths = [path for path, _ in pairs]
        shared = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(
            f"`policy` must have one path for each adapter; got two at {', '.join(shared)}. Rename "
            "the keys of its dictionaries so that they contain no dot."
        )
    return by_path


def check_no_adapters(policy: PyTree) -> None:
    """Raises if the policy already has adapters."""
    if adapters(policy):
        raise ValueError("`policy` has adapters already; merge them first, with `merge_lora`.")


def is_linear(node: Any) -> bool:
    """Whether `node` is a linear layer that can have an adapter, quantised or not."""
    return is_plain_linear(node) or is_quantized(node)


def weight_shape(layer: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a linear layer's weight, without decoding it."""
    stored = layer.stored if isinstance(layer, Quantized) else layer.weight
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype)


def _is_lora(node: Any) -> bool:
    return isinstance(node, LoRA)


def _replace(policy: Policy, function: Callable[[LoRA], Any]) -> Policy:
    return jax.tree.map(
        lambda node: function(node) if isinstance(node, LoRA) else node, policy, is_leaf=_is_lora
    )


def _adapter(layer: Any, rank: int, scale: float, key: PRNGKeyArray) -> LoRA:
    weight = weight_shape(layer)
    *lead, out, width = weight.shape
    dtype = at_least_float32(weight.dtype)
    bound = 1 / math.sqrt(width)
    down = jax.random.uniform(key, (*lead, rank, width), dtype, -bound, bound)
    return LoRA(layer, down, jnp.zeros((*lead, out, rank), dtype), scale)


def _check_positive(**values: float | int | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be positive; got {value}.")
