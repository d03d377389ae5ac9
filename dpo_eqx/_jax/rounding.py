"""Rounding of half precision at fixed places, so that policy and reference agree to the last bit.

XLA keeps intermediate results of fused operations in float32. It cannot do so if the backward pass
needs them, too. Then a policy and a reference with the same parameters have different
log-probabilities, tenths of a nat apart for Llama-3.2-1B on an H200.
"""

from typing import TypeVar

import jax

from .dtypes import is_narrow

Arrays = TypeVar("Arrays")


def rounded(arrays: Arrays) -> Arrays:
    """The same arrays, rounded to their dtype here if it is narrower than float32.

    Every product with weights goes through here, since the backward pass keeps these products.
    Float32 is left alone: XLA has nothing to round there.
    """
    return jax.lax.optimization_barrier(arrays) if is_narrow(arrays) else arrays
