"""Linear layers whose weights are held with 8 or 4 bits, in any Equinox module, by tree surgery.

How a weight becomes codes and scales is in `formats.py`. They are frozen: what is trained on such
a base are adapters, or what is not quantised.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .formats import FORMATS, Int8Weight, NF4Weight
from .linear_layers import is_plain_linear, linear_paths, replace_at

Policy = TypeVar("Policy")


class Quantized(eqx.Module):
    """A linear layer whose weight is held in fewer bits, and decoded each time it is called.

    It is called as the layer is, and computes in the dtype of its input. The decoded weight is
    never kept for the backward pass, which decodes it once more: where layers are stacked and run
    by `lax.scan`, one layer's exists at a time. Gradients flow to the input and the bias; there is
    none of the weight.

    **Arguments:**

    - `layer`: the layer, without its weight.
    - `stored`: the weight, stacked along leading axes or not.
    """

    layer: Any
    stored: Int8Weight | NF4Weight

    def __call__(
        self, x: Float[Array, "*batch in"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out"]:
        return eqx.filter_checkpoint(_call)(self, x)

    @staticmethod
    def of(layer: Any) -> "Quantized":
        """The layer with its weight, which is stored already, apart from the rest."""
        return Quantized(_with_weight(layer, None), layer.weight)

    @property
    def weight(self) -> Float[Array, "*layers out in"]:
        """The decoded weight, in the dtype that it had."""
        return self.stored.decode()

    @property
    def bias(self) -> Array | None:
        """The layer's own."""
        return self.layer.bias

    def plain(self) -> Any:
        """The layer with its decoded weight."""
        return _with_weight(self.layer, self.weight)


def quantize(policy: Policy, format: str, *, target: str | None = None) -> Policy:
    """Holds the weights of linear layers of any Equinox module in 8 or 4 bits, frozen.

    ```python
    policy = models.quantize(policy, "nf4")
    policy = models.add_lora(policy, rank=16, key=key)
    ```

    Codes and scales are integers, so that no filter of floating-point arrays trains them.
    `models.load(path, quantize=...)` gives the same and never holds the whole weights.

    **Arguments:**

    - `policy`: holds layers of ours or `eqx.nn.Linear`, stacked along leading axes or not, with
        adapters or without.
    - `format`: `"int8"`, one scale for each output, or `"nf4"`, 4-bit NormalFloats with a scale
        for each 64 weights. They take 1 and 0.56 bytes a weight.
    - `target`: a regular expression, searched in the path of each layer's weight as in
        `add_lora`. By default every linear layer but the unembedding. One that is quantised gets
        an adapter from `add_lora` as all others do.

    **Raises:**

    `ValueError` where `target` matches no linear layer that is not quantised yet, or the format
    is another.

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
    """The policy with its quantised weights decoded, in the dtype that they had.

    Adapters stay; `merge_lora` decodes and merges.
    """
    return jax.tree.map(
        lambda node: node.plain() if isinstance(node, Quantized) else node,
        policy,
        is_leaf=is_quantized,
    )


def is_quantized(node: Any) -> bool:
    """Whether `node` is a quantised linear layer."""
    return isinstance(node, Quantized)


def holds_quantized(policy: PyTree) -> bool:
    """Whether any layer of the policy is quantised."""
    return any(map(is_quantized, jax.tree.leaves(policy, is_leaf=is_quantized)))


def check_format(name: str, format: str) -> None:
    """Raises if there is no such format; `name` is the argument's."""
    if format not in FORMATS:
        raise ValueError(f"`{name}` must be one of {', '.join(FORMATS)}; got {format!r}.")


def _paths(policy: PyTree, target: str | None) -> set[str]:
    try:
        return linear_paths(policy, target, is_plain_linear)
    except ValueError as error:
        raise ValueError(f"There is nothing to quantise in `policy`. {error}") from None


def _call(layer: Quantized, x: Array) -> Array:
    return _with_weight(layer.layer, layer.weight.astype(x.dtype))(x)


def _with_weight(layer: Any, weight: Any) -> Any:
    return eqx.tree_at(lambda each: each.weight, layer, weight, is_leaf=lambda x: x is None)
