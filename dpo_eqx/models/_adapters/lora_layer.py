"""A linear layer with a low-rank adapter: how it is called, and its weight.

`lora.py` puts adapters into a policy and takes them out again. `magnitude.py` has what DoRA adds.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt32

from ..._jax.dtypes import at_least_float32
from ..._jax.grouped_dot import grouped_dot
from ..._jax.rounding import rounded
from .._decoder.basic_layers import dropout
from .._decoder.random_parts import AbstractRandomPart
from .magnitude import Magnitude, row_norms, scale_rows
from .quantize import is_linear


class LoRA(AbstractRandomPart):
    r"""A linear layer with a low-rank term added to its weight: $W + s\,B A$.

    With magnitudes (DoRA), each row of this weight is scaled to a trained length $m$:
    $m\,(W + s\,B A) / \Vert W + s\,B A \Vert$. No gradient flows through the norm.

    It is called like the layer. Layers that are stacked along leading axes have adapters stacked
    in the same way. A layer of experts has an adapter for each expert.

    **Arguments:**

    - `base`: the linear layer, which `lora_filter` freezes.
    - `down`: $A$. Shape `(*layers, rank, in)`; for experts `(*layers, experts, rank, in)`.
    - `up`: $B$. Shape `(*layers, out, rank)`; for experts `(*layers, experts, out, rank)`.
    - `scale`: $s$, which is `alpha / rank`, or `alpha / sqrt(rank)` if it is rank-stabilised.
    - `dropout`: the probability of dropout of the input of $A$; the layer reads the whole input.
    - `pinned`: the copy of what is trained that `pin_lora` stored, or `None`; `lora_filter` freezes
        it.
    - `rank_stabilised`: how a file states the scale; it has no effect on the result.
    - `magnitude`: $m$, or `None` without DoRA.
    - `key`: the random key of dropout. `keyed_lora` sets it for one call; without a key no dropout
        applies.
    """

    base: Any
    down: Float[Array, "*layers rank in"]
    up: Float[Array, "*layers out rank"]
    scale: float = eqx.field(static=True)
    dropout: float = eqx.field(static=True, default=0.0)
    pinned: tuple[Array, ...] | None = None
    rank_stabilised: bool = eqx.field(static=True, default=False)
    magnitude: Magnitude | None = None
    key: Key[Array, "*layers"] | UInt32[Array, "*layers words"] | None = None

    def __call__(
        self,
        x: Float[Array, "*batch in"],
        *expert: Int[Array, " rows"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch out"]:
        read = dropout(x, self.dropout, self.key if key is None else key)
        low = times(read, self.down, *expert)
        y, term = self.base(x, *expert), self.scale * times(low, self.up, *expert)
        if self.magnitude is None:
            return y + term
        # As in PEFT: the layer itself reads the whole input, and what DoRA adds reads the same
        # input as the adapter.
        product = y if read is x else self.base(read)
        if self.bias is not None:
            product = product - jnp.broadcast_to(self.bias.astype(x.dtype), y.shape)
        return scale_rows(y, product, term, self._ratio())

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
    def trained(self) -> tuple[Any, ...]:
        """What `lora_filter` selects: arrays, or what a pytree like this one has in their place."""
        low_rank = self.down, self.up
        return low_rank if self.magnitude is None else (*low_rank, self.magnitude.change)

    def with_trained(self, trained: tuple[Any, ...]) -> "LoRA":
        """The same adapter with other arrays as `trained`."""
        return eqx.tree_at(lambda lora: lora.trained, self, trained)

    @property
    def weight(self) -> Float[Array, "*layers out in"]:
        r"""The weight of layer and adapter together, in the layer's dtype."""
        weight = self._sum()
        if self.magnitude is not None:
            weight = self._ratio()[..., None] * weight
        return weight.astype(self.base.weight.dtype)

    @property
    def bias(self) -> Array | None:
        """The bias of the layer."""
        return self.base.bias

    def lengths(self) -> Float[Array, "*layers out"] | None:
        """The lengths of the rows of `weight`; `None` if they depend on a weight that is left out.

        They depend on the base only in rows without a magnitude.
        """
        given = None
        if self.magnitude is not None and self.magnitude.start is not None:
            given = self.magnitude.first + self.magnitude.change
        if given is not None and np.isfinite(given).all():
            return given
        if not is_linear(self.base):
            return None
        as_they_are = row_norms(self._sum())
        return as_they_are if given is None else jnp.where(jnp.isinf(given), as_they_are, given)

    def _sum(self) -> Float[Array, "*layers out in"]:
        r"""$W + s\,B A$, in float32 or wider."""
        weight = self.base.weight
        wide = at_least_float32(weight.dtype)
        term = self.up.astype(wide) @ self.down.astype(wide)
        return weight.astype(wide) + self.scale * term

    def _ratio(self) -> Float[Array, "*layers out"]:
        """The trained length of each row of the weight, divided by its length without DoRA."""
        assert self.magnitude is not None
        return self.magnitude.ratio(row_norms(self.base.weight), row_norms(self._sum()))


def times(
    x: Float[Array, "*batch in"],
    matrix: Float[Array, "*experts out in"],
    *expert: Int[Array, " rows"],
) -> Float[Array, "*batch out"]:
    """Each row of `x` times the matrix, or times the matrix of its expert, in the dtype of `x`."""
    matrix = matrix.astype(x.dtype)
    return rounded(grouped_dot(x, matrix, *expert) if expert else x @ matrix.T)
