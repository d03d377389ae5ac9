"""Rounding of half precision at fixed places, so that policy and reference agree to the last bit.

XLA keeps intermediate results of fused operations in float32. It cannot do so if the backward pass
needs them, too. Then a policy and a reference with the same parameters have different
log-probabilities, tenths of a nat apart for Llama-3.2-1B on an H200.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .dtypes import is_narrow

Arrays = TypeVar("Arrays")


def rounded(arrays: Arrays) -> Arrays:
    """The same arrays, rounded to their dtype here if it is narrower than float32.

    Every product with weights goes through here, since the backward pass keeps these products.
    Float32 is left alone: XLA has nothing to round there.
    """
    return jax.lax.optimization_barrier(arrays) if is_narrow(arrays) else arrays


def rounded_if_fused(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The same array, rounded to its dtype here even if XLA fuses its producer with its reader.

    On CPUs `rounded` does not do that: XLA drops the barrier before it fuses.
    """
    if not is_narrow(x):
        return x
    # The exponent bits of float32, so that the small numbers of float16 stay.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=jnp.finfo(x.dtype).nmant)
