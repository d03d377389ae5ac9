"""The magnitudes of DoRA: a trained length for each row of a weight with an adapter.

`lora_layer.py` has the weight that they belong to.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32, UInt64

from ..._jax.dtypes import at_least_float32


class Magnitude(eqx.Module):
    r"""The lengths $m$ of the rows of a weight, as what they were at first and how they changed.

    $m$ alone would be rounded in a forward pass in half precision: it would not start as the length
    of a row, and no small change would be seen. Here a change of zero is exactly the base, in any
    dtype.

    **Arguments:**

    - `change`: the trained difference from the first length. Shape `(*layers, out)`.
    - `start`: the bits of the lengths of the base's rows. Stored as integers, they are never
        selected for training or cast to a compute dtype. It is infinity for a row without a
        magnitude, whose length is not changed and whose `change` gets no gradient: a row of zeros
        has no direction, and a stack may hold layers without an adapter.
    """

    change: Float[Array, "*layers out"]
    start: UInt32[Array, "*layers out"] | UInt64[Array, "*layers out"]

    @staticmethod
    def of(norms: Float[Array, "*layers out"], dtype: Any) -> "Magnitude":
        """Magnitudes that start at these lengths of the base's rows."""
        start = jnp.where(norms > 0, norms, jnp.inf).astype(dtype)
        bits = jnp.uint64 if start.dtype == jnp.float64 else jnp.uint32
        return Magnitude(jnp.zeros_like(start), jax.lax.bitcast_convert_type(start, bits))

    @property
    def first(self) -> Float[Array, "*layers out"]:
        """The lengths at first."""
        dtype = jnp.float64 if self.start.dtype == jnp.uint64 else jnp.float32
        return jax.lax.bitcast_convert_type(self.start, dtype)

    def ratio(
        self, base: Float[Array, "*layers out"], norms: Float[Array, "*layers out"]
    ) -> Float[Array, "*layers out"]:
        r"""$m$ divided by the lengths of the rows as they are.

        **Arguments:**

        - `base`: the lengths of the base's rows. They are `first`, but rounded as the other lengths
            are if the base was cast to another dtype.
        - `norms`: the lengths of the rows of $W + s\,B A$.
        """
        first = self.first.astype(norms.dtype)
        grown = 1 + self.change.astype(norms.dtype) / first
        ratio = base / jnp.where(norms == 0, jnp.ones_like(norms), norms) * grown
        return jnp.where(jnp.isinf(first), jnp.ones_like(ratio), ratio)


def scale_rows(
    y: Float[Array, "*batch out"],
    product: Float[Array, "*batch out"],
    term: Float[Array, "*batch out"],
    ratio: Float[Array, " out"],
) -> Float[Array, "*batch out"]:
    """The output of a layer whose rows are scaled by `ratio`, in the dtype of `y`.

    **Arguments:**

    - `y`: the output of the base, with its bias.
    - `product`: the product of input and base weight, without bias.
    - `term`: what the adapter adds to it.
    """
    wide = jnp.broadcast_to(ratio, y.shape)
    # Exactly `y` at a ratio of 1 and a term of 0.
    added = (wide - 1) * product.astype(wide.dtype) + wide * term.astype(wide.dtype)
    return y + added.astype(y.dtype)


def row_norms(weight: Float[Array, "*layers out in"]) -> Float[Array, "*layers out"]:
    """The Euclidean length of each row, in float32 or wider. No gradient flows through it."""
    wide = jax.lax.stop_gradient(weight).astype(at_least_float32(weight.dtype))
    return jnp.sqrt(jnp.sum(wide**2, axis=-1))


def norms_of(layer: Any, depth: int) -> Float[Array, "*layers out"]:
    """The lengths of the rows of a linear layer's weight, stacked along `depth` leading axes.

    At most one layer of a stack of quantised layers is decoded at a time.
    """

    norms: Callable[[Any], Array] = _norms
    for _ in range(depth):
        norms = partial(_over_layers, norms)
    return _run(norms, layer)


@eqx.filter_jit
def _run(norms: Callable[[Any], Array], layer: Any) -> Array:
    return norms(layer)


def _norms(layer: Any) -> Array:
    return row_norms(layer.weight)


def _over_layers(function: Callable[[Any], Array], layer: Any) -> Array:
    arrays, static = eqx.partition(layer, eqx.is_array)
    return jax.lax.map(lambda arrays: function(eqx.combine(arrays, static)), arrays)
