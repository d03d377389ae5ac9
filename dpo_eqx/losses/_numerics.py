"""Functions of arrays that are safe at extreme values: no overflow, no `0 * inf`.

Nothing here depends on the losses.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from .._jax.dtypes import at_least_float32


def wide(x: Shaped[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """`x` as a JAX array in float32 or wider, since `exp(12)` is infinite in float16."""
    x = jnp.asarray(x)
    return x.astype(at_least_float32(x.dtype))


def difference(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x - y`, which is finite if both are finite.

    Past the largest number of the dtype the value is that number, and the slopes stay 1 and -1.
    """
    plain = x - y
    overflow = jnp.isinf(plain) & jnp.isfinite(x) & jnp.isfinite(y)
    slopes = (x - jax.lax.stop_gradient(x)) - (y - jax.lax.stop_gradient(y))
    return jnp.where(overflow, finite(jax.lax.stop_gradient(plain)) + slopes, plain)


def finite(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` with infinities replaced by the largest numbers of the dtype, at a slope of 0."""
    limits = jnp.finfo(x.dtype)
    return jnp.clip(x, float(limits.min), float(limits.max))


def times(coefficient: ArrayLike, x: Float[Array, "*shape"]) -> Float[Array, "..."]:
    """`coefficient * x`, except that 0 times an infinity is 0.

    The product with a finite `x` is finite: if it would overflow, it is the largest number of the
    dtype. The slope with respect to `x` stays the coefficient.
    """
    coefficient = jnp.asarray(coefficient)
    product = coefficient * jnp.where((coefficient == 0) & jnp.isinf(x), 0, x)
    overflow = jnp.isinf(product) & jnp.isfinite(x)
    held = jnp.where(overflow, x, 0)
    slope = coefficient * (held - jax.lax.stop_gradient(held))
    return jnp.where(overflow, finite(jax.lax.stop_gradient(product)) + slope, product)


def exponent_limit(dtype: jnp.dtype) -> float:
    """The exponent past which exponentials continue linearly. Their squares are finite too."""
    return 300.0 if jnp.finfo(dtype).bits >= 64 else 40.0


def exponential(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""$e^x$, continued by its tangent past `exponent_limit`.

    Clamping the exponent instead would make the gradient 0 for the pairs with the largest loss.
    """
    x = wide(x)
    limit = exponent_limit(x.dtype)
    return jnp.exp(jnp.minimum(x, limit)) + _tangent(x - limit, slope=float(np.exp(limit)))


def exponential_minus_1(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`exponential(x) - 1`, precise for small `x`."""
    x = wide(x)
    limit = exponent_limit(x.dtype)
    return jnp.expm1(jnp.minimum(x, limit)) + _tangent(x - limit, slope=float(np.exp(limit)))


def square_limit(dtype: jnp.dtype) -> float:
    """A number far past every log-ratio, whose square is still far from an overflow."""
    return 1e150 if jnp.finfo(dtype).bits >= 64 else 1e15


def square(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""$x^2$, continued by its tangent past `square_limit`.

    No log-ratio is that large, but the score of an exponential divergence can be: `forward_kl` of
    a log-ratio of $-10^4$ is $-10^{21}$ in float32, and its square would overflow.
    """
    limit = square_limit(x.dtype)
    near = jnp.clip(x, -limit, limit)
    return near * near + _tangent(jnp.abs(x) - limit, slope=2 * limit)


def log_1_minus_exp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""$\log(1 - e^x)$ of a negative `x`.

    Not `jax.nn.log1mexp`, whose second derivative is NaN from about 100 on.
    """
    # The form that `where` does not select gets a harmless number, so that its gradient is finite.
    near = x > -0.7
    by_expm1 = jnp.log(-jnp.expm1(jnp.where(near, x, -1)))
    by_log1p = jnp.log1p(-jnp.exp(jnp.where(near, -1, x)))
    return jnp.where(near, by_expm1, by_log1p)


def _tangent(excess: Float[Array, "*shape"], *, slope: float) -> Float[Array, "*shape"]:
    """`slope * max(excess, 0)` up to a thousandth of the dtype's largest number, then flatter.

    The result is finite exactly if `excess` is, and its slope is never 0 past the limit.
    """
    steep = float(jnp.finfo(excess.dtype).max) / 1024 / slope
    return slope * jnp.clip(excess, 0, steep) + jnp.maximum(excess - steep, 0) / 1024


def present(
    values: Float[Array | np.ndarray, "*shape"], weight: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """`values`, with 0 in place of a NaN or an infinity of weight 0, since `0 * nan` is NaN.

    Finite values stay, since the derivative of `weight * value` with respect to a weight of 0 is
    the value.
    """
    return jnp.where((weight != 0) | jnp.isfinite(values), values, 0)


def weighted_mean(
    values: Float[Array, " pairs"], weight: Float[Array | np.ndarray, " pairs"] | None
) -> Float[Array, ""]:
    """The weighted mean. A row of weight 0 does not count, even if it is NaN or infinite.

    The mean is 0 if all weights are 0.
    """
    if weight is None:
        return values.mean()
    weight = jnp.asarray(weight).astype(values.dtype)
    total = weight.sum()
    return (weight * present(values, weight)).sum() / jnp.where(total > 0, total, 1)
