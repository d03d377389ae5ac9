"""A linear layer with a low-rank adapter: how it is called, and its weight.

`lora.py` puts adapters into a policy and takes them out again.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key, PRNGKeyArray, UInt32

from ..._jax.dtypes import at_least_float32
from ..._jax.rounding import rounded
from .._decoder.basic_layers import dropout
from .._decoder.random_parts import AbstractRandomPart


class LoRA(AbstractRandomPart):
    r"""A linear layer with a low-rank term added to its weight: $W + s\,B A$.

    It is called like the layer. Layers that are stacked along leading axes have adapters stacked
    in the same way.

    **Arguments:**

    - `base`: the linear layer, which `lora_filter` freezes.
    - `down`: $A$. Shape `(*layers, rank, in)`.
    - `up`: $B$. Shape `(*layers, out, rank)`.
    - `scale`: $s$, which is `alpha / rank`, or `alpha / sqrt(rank)` if it is rank-stabilised.
    - `dropout`: the probability of dropout of the input of $A$; the layer reads the whole input.
    - `pinned`: the copy of $A$ and $B$ that `pin_lora` stored, or `None`; `lora_filter` freezes it.
    - `rank_stabilised`: how a file states the scale; it has no effect on the result.
    - `key`: the random key of dropout. `keyed_lora` sets it for one call; without a key no dropout
        applies.
    """

    base: Any
    down: Float[Array, "*layers rank in"]
    up: Float[Array, "*layers out rank"]
    scale: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True, default=0.0)
    pinned: tuple[Array, Array] | None = None
    rank_stabilised: bool = eqx.field(static=True, default=False)
    key: Key[Array, "*layers"] | UInt32[Array, "*layers words"] | None = None

    def __call__(
        self, x: Float[Array, "*batch in"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out"]:
        read = dropout(x, self.dropout, self.key if key is None else key)
        low = rounded(read @ self.down.astype(x.dtype).T)
        return self.base(x) + self.scale * rounded(low @ self.up.astype(x.dtype).T)

    @property
    def is_random(self) -> bool:
        """Whether there is dropout."""
        # In a hybrid, a layer holds no arrays of the mixer that it does not have.
        return self.dropout > 0 and self.down is not None

    def with_key(self, key: PRNGKeyArray) -> "LoRA":
        """The same adapter, which applies its dropout with this key."""
        # A stack gets one key for each layer.
        *lead, _, _ = self.down.shape
        return dataclasses.replace(self, key=jax.random.split(key, tuple(lead)) if lead else key)

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
