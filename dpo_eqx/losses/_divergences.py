r"""The divergences of f-DPO, as functions of the log-ratio $\rho = \log\pi - \log\pi_{ref}$.

Each function is the score $s(\rho) = f'(e^\rho)$ of an f-divergence, up to a constant. It replaces
$\rho$ in losses of the difference $s(\rho_w) - s(\rho_l)$, in which alone the partition function
cancels. A user's divergence is any increasing function of $\rho$.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from ._form import Scalar
from ._numerics import exponential_minus_1, times, wide

Divergence = Callable[[Float[Array, " pairs"]], Float[Array, " pairs"]]


def reverse_kl(rho: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
    r"""$s(\rho) = \rho$: the divergence of DPO itself.

    **Arguments:**

    - `rho`: log-ratios, in nats. Shape `(pairs,)`.

    **Returns:**

    The scores, of shape `(pairs,)`.
    """
    return rho


def forward_kl(rho: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
    r"""$s(\rho) = 1 - e^{-\rho}$: mass-covering with respect to the reference.

    Past an exponent of 40 (300 in float64) the tangent continues it, finite and never flat.

    **Arguments:**

    - `rho`: log-ratios, in nats. Shape `(pairs,)`.

    **Returns:**

    The scores, of shape `(pairs,)`.

    ??? cite

        Wang et al., *Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse
        Divergence Constraints*, 2023 (arXiv 2309.16240).
    """
    return -exponential_minus_1(-rho)


def jensen_shannon(rho: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
    r"""$s(\rho) = \log 2 + \log\sigma(\rho)$: bounded above, linear below.

    **Arguments:**

    - `rho`: log-ratios, in nats. Shape `(pairs,)`.

    **Returns:**

    The scores, of shape `(pairs,)`.

    ??? cite

        Wang et al., *Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse
        Divergence Constraints*, 2023 (arXiv 2309.16240).
    """
    return jnp.log(2.0) + log_sigmoid(wide(rho))


def alpha_divergence(a: Scalar) -> Divergence:
    r"""$s(\rho) = (1 - e^{-a\rho}) / a$: from reverse KL at $a = 0$ to forward KL at $a = 1$.

    Differs from TRL 1.16, whose coefficient is $1 - a$. Past an exponent $-a\rho$ of 40 (300 in
    float64) the tangent continues it.

    **Arguments:**

    - `a`: the coefficient in the paper's convention: a number, a scalar or one value per pair.

    **Returns:**

    The divergence, a function of the log-ratio.

    ??? cite

        Wang et al., *Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse
        Divergence Constraints*, 2023 (arXiv 2309.16240).
    """

    def score(rho: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
        rho = wide(rho)
        coefficient = jnp.asarray(a)
        zero = coefficient == 0
        divisor = jnp.where(zero, 1, coefficient)
        # At 0 the series is used, so that the derivative with respect to `a` is right there too.
        # Infinities are taken out of the square, whose slope would be 0 * inf.
        small = jnp.where(zero & jnp.isfinite(rho), rho, 0)
        series = rho - times(coefficient, small * small) / 2
        return jnp.where(zero, series, -exponential_minus_1(times(-divisor, rho)) / divisor)

    return score
