"""Quantises linear layers of any Equinox module to 8 or 4 bits, by tree surgery.

`formats.py` encodes and decodes weights. Quantised weights are frozen: training changes adapters,
or the layers that are not quantised.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .formats import FORMATS, Int8Weight, NF4Weight
from .linear_layers import is_plain_linear, is_router, linear_paths, replace_at

Policy = TypeVar("Policy")


class Quantized(eqx.Module):
    """A linear layer whose weight is stored in fewer bits and decoded on each call.

    It is called like the layer, and computes in the dtype of its input. The decoded weight is not
    stored for the backward pass, which decodes it again: if `lax.scan` runs stacked layers, only
    one layer's decoded weight exists at a time, with all its experts if it is a layer of experts.
    Gradients flow to the input and the bias, but not to the weight.

    **Arguments:**

    - `layer`: the linear layer, without its weight.
    - `stored`: the encoded weight, stacked along leading axes or not.
    """

    layer: Any
    stored: Int8Weight | NF4Weight

    def __call__(
        self,
        x: Float[Array, "*batch in"],
        *expert: Int[Array, " rows"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch out"]:
        # Without the checkpoint, the decoded weight would be a residual of the product.
        return eqx.filter_checkpoint(_call)(self, x, *expert)

    @staticmethod
    def of(layer: Any) -> "Quantized":
        """A quantised layer from a layer whose weight is already encoded."""
        return Quantized(_with_weight(layer, None), layer.weight)

    @property
    def weight(self) -> Float[Array, "*layers out in"]:
        """The decoded weight, in its original dtype."""
        return self.stored.decode()

    @property
    def bias(self) -> Array | None:
        """The bias of the layer."""
        return self.layer.bias

    def plain(self) -> Any:
        """The layer with its decoded weight."""
        return _with_weight(self.layer, self.weight)


def quantize(policy: Policy, format: str, *, target: str | None = None) -> Policy:
    """Stores the weights of linear layers of any Equinox module in 8 or 4 bits, frozen.

    ```python
    policy = models.quantize(policy, "nf4")
    policy = models.add_lora(policy, rank=16, key=key)
    ```

    Codes and scales are integers, so that no filter of floating-point arrays selects them for
    training. `models.load(path, quantize=...)` gives the same result without ever holding all
    unquantised weights.

    **Arguments:**

    - `policy`: a pytree with linear layers, this library's or `eqx.nn.Linear`, stacked along
        leading axes or not, with adapters or without. Experts are such layers; routers are not.
    - `format`: `"int8"`, with one scale per output, or `"nf4"`, 4-bit NormalFloats with one scale
        per 64 weights. They take 1 and 0.56 bytes per weight.
    - `target`: a regular expression, searched in the path of each layer's weight as in
        `add_lora` (default: every linear layer but the unembedding). `add_lora` adds adapters to
        quantised layers, too.

    **Raises:**

    `ValueError` if `target` matches no linear layer that is not yet quantised, or the format is
    unknown.

    ??? cite

        int8: Dettmers et al., *LLM.int8()*, 2022, section 2.1 (arXiv 2208.07339), of weights only.
        nf4: Dettmers et al., *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023 (arXiv
        2305.14314).
    """
    check_format("format", format)
    paths = _paths(policy, target)
    encode = eqx.filter_jit(FORMATS[format].encode)

    return replace_at(
        policy,
        paths,
        is_plain_linear,
        lambda _, layer: Quantized.of(_with_weight(layer, encode(layer.weight))),
    )


def dequantize(policy: Policy) -> Policy:
    """The policy with its quantised weights decoded, in their original dtype.

    Adapters stay; `merge_lora` decodes the weights and merges the adapters.
    """
    return jax.tree.map(
        lambda node: node.plain() if isinstance(node, Quantized) else node,
        policy,
        is_leaf=is_quantized,
    )


def is_quantized(node: Any) -> bool:
    """Whether `node` is a quantised linear layer."""
    return isinstance(node, Quantized)


def is_linear(node: Any) -> bool:
    """Whether `node` is a linear layer that can have an adapter, quantised or not."""
    return is_plain_linear(node) or is_quantized(node) or is_router(node)


def weight_shape(layer: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a linear layer's weight, without decoding it."""
    stored = layer.stored if isinstance(layer, Quantized) else layer.weight
    return jax.ShapeDtypeStruct(stored.shape, stored.dtype)


def holds_quantized(policy: PyTree) -> bool:
    """Whether any layer of the policy is quantised."""
    return any(map(is_quantized, jax.tree.leaves(policy, is_leaf=is_quantized)))


def check_format(name: str, format: str) -> None:
    """Raises if the format is unknown; `name` is the name of the argument."""
    if format not in FORMATS:
        raise ValueError(f"`{name}` must be one of {', '.join(FORMATS)}; got {format!r}.")


def _paths(policy: PyTree, target: str | None) -> set[str]:
    try:
        return linear_paths(policy, target, is_plain_linear)
    except ValueError as error:
        raise ValueError(f"There is nothing to quantise in `policy`. {error}") from None


def _call(layer: Quantized, x: Array, *expert: Array) -> Array:
    return _with_weight(layer.layer, layer.weight.astype(x.dtype))(x, *expert)


def _with_weight(layer: Any, weight: Any) -> Any:
    return eqx.tree_at(lambda each: each.weight, layer, weight, is_leaf=lambda x: x is None)
