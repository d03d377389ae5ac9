"""The first values of a new adapter of one linear layer, and its scale.

`lora.py` puts adapters into a policy.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ..._jax.dtypes import at_least_float32
from .magnitude import Magnitude, norms_of
from .quantize import weight_shape


def lora_scale(alpha: float | int, rank: int, *, rank_stabilised: bool) -> float:
    """The factor of an adapter's term."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def first_matrices(layer: Any, rank: int, key: PRNGKeyArray) -> tuple[Array, Array]:
    """The $A$ and $B$ of a new adapter."""
    weight = weight_shape(layer)
    *lead, out, width = weight.shape
    dtype = at_least_float32(weight.dtype)
    bound = 1 / math.sqrt(width)
    down = jax.random.uniform(key, (*lead, rank, width), dtype, -bound, bound)
    return down, jnp.zeros((*lead, out, rank), dtype)


def first_magnitude(layer: Any) -> Magnitude:
    """The magnitudes of a linear layer without an adapter."""
    weight = weight_shape(layer)
    return Magnitude.of(norms_of(layer, len(weight.shape) - 2), at_least_float32(weight.dtype))
