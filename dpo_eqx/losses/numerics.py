"""Functions of one array that stay finite where the textbook formula overflows, and the mean.

Nothing here knows what a loss is.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def exponent_limit(dtype: jnp.dtype) -> float:
    """The exponent past which our exponentials go on linearly: finite, and so is the square."""
    return 300.0 if jnp.finfo(dtype).bits >= 64 else 40.0


def exponential(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""$e^x$, going on as its tangent past `exponent_limit`.

    Clamping the exponent instead would leave a gradient of zero where a loss is worst.
    """
    limit = exponent_limit(x.dtype)
    return jnp.exp(jnp.minimum(x, limit)) + float(np.exp(limit)) * jnp.maximum(x - limit, 0)


def exponential_minus_1(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`exponential(x) - 1`, precise where `x` is small."""
    limit = exponent_limit(x.dtype)
    return jnp.expm1(jnp.minimum(x, limit)) + float(np.exp(limit)) * jnp.maximum(x - limit, 0)


def square(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""$x^2$, going on as its tangent past $10^{15}$ in float32, $10^{150}$ in float64.

    No log-ratio is that large, but the score of an exponential divergence can be: $-10^{21}$ for
    `forward_kl` of a log-ratio of $-10^4$ in float32, where the square would overflow.
    """
    limit = 1e150 if jnp.finfo(x.dtype).bits >= 64 else 1e15
    near = jnp.clip(x, -limit, limit)
    return near * (2 * x - near)


def weighted_mean(
    values: Float[Array, " pairs"], weight: Float[Array | np.ndarray, " pairs"] | None
) -> Float[Array, ""]:
    """The mean with weights; a row of weight 0 has no part in it, whatever it holds.

    0 where all weights are 0.
    """
    if weight is None:
        return values.mean()
    weight = jnp.asarray(weight).astype(values.dtype)
    total = weight.sum()
    # `where`, since 0 * nan is nan.
    return (weight * jnp.where(weight > 0, values, 0)).sum() / jnp.where(total > 0, total, 1)
