"""Solves systems with lower triangular matrices that have ones on the diagonal.

The gated delta rule in `delta_rule.py` has one system for each chunk of tokens and head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..._jax.by_platform import CPU, by_platform
from ..._jax.mapped_axes import vary_alike


def solve_unit_lower(
    matrix: Float[Array, "*batch size size"], known: Float[Array, "*batch size columns"]
) -> Float[Array, "*batch size columns"]:
    """Solves `(1 + L) x = known`, where `L` is `matrix` below its diagonal.

    CPUs compute the inverse by products. There, JAX's own solver waits inside a thread of XLA's
    pool for work that it hands to this pool. If every thread of the pool waits so, the program
    never ends (seen with jaxlib 0.10.2 on two cores).
    """
    strict, known = vary_alike(jnp.tril(matrix, -1), known)

    def system(x):
        return x + strict @ x

    def solver(*, transposed: bool):
        # `custom_linear_solve` never differentiates it, and so not the choice of the platform.
        def solve(_, sides):
            return by_platform(
                lambda platform: (platform == CPU, transposed), _solve, strict, sides
            )

        return solve

    return jax.lax.custom_linear_solve(
        system, known, solver(transposed=False), solver(transposed=True)
    )


def _solve(plan: tuple[bool, bool], strict: Array, known: Array) -> Array:
    """The solution, for a plan: whether by the inverse, and whether of the transposed system."""
    by_inverse, transposed = plan
    if by_inverse:
        inverse = inverse_of(strict)
        return (jnp.swapaxes(inverse, -1, -2) if transposed else inverse) @ known
    return jax.lax.linalg.triangular_solve(
        strict, known, left_side=True, lower=True, unit_diagonal=True, transpose_a=transposed
    )


def inverse_of(strict: Float[Array, "*batch size size"]) -> Float[Array, "*batch size size"]:
    """The inverse of `1 + strict`, where `strict` is zero on its diagonal and above.

    Blocks along the diagonal are inverted, from size 1 on, and joined in pairs: with the inverses
    $A$ and $B$ of two blocks and $C$ below the first, that of both has $-B C A$ below $A$. This is
    exact where the series of powers of `strict` loses all digits, as when tokens repeat.
    """
    size = strict.shape[-1]
    place = jnp.arange(size, dtype=jnp.int32)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=strict.dtype), strict.shape)
    block = 1
    while block < size:
        alone, both = place // block, place // (2 * block)
        is_joined = (both[:, None] == both[None]) & (alone[:, None] != alone[None])
        joined = jnp.where(jnp.broadcast_to(is_joined, strict.shape), strict, 0)
        inverse = inverse - inverse @ joined @ inverse
        block *= 2
    return inverse
