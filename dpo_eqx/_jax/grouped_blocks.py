"""The products of `grouped_dot.py` on CPUs, a block of rows at a time. They have no derivatives.

There, JAX's own `ragged_dot` multiplies every row by every matrix.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .mapped_axes import vary_alike

# Rows of a block. Every group has one block that is not full.
BLOCK = 64


def dot_by_blocks(
    x: Float[Array, "rows in"],
    matrices: Float[Array, "groups out in"],
    sizes: Int[Array, " groups"],
) -> Float[Array, "rows out"]:
    """Each row times the matrix of its group. The first `sizes[0]` rows are in group 0, and so on.

    **Arguments:**

    - `x`: rows sorted by group.
    - `matrices`: one matrix for each group.
    - `sizes`: the number of rows of each group.
    """
    rows, width = _padded(x)

    def one_block(group, start, count, products):
        own = jax.lax.dynamic_slice_in_dim(rows, start, width)
        product = own @ matrices[group].T
        # Rows past the end of the group are written again by the blocks of the next groups.
        return jax.lax.dynamic_update_slice_in_dim(products, product, start, axis=0)

    empty = jnp.zeros((len(rows), matrices.shape[1]), x.dtype)
    return _over_blocks(sizes, width, one_block, empty, x)[: len(x)]


def outer_by_blocks(
    y: Float[Array, "rows out"], x: Float[Array, "rows in"], sizes: Int[Array, " groups"]
) -> Float[Array, "groups out in"]:
    """For each group, the sum of `outer(y[i], x[i])` over its rows, which are sorted by group."""
    (left, width), (right, _) = _padded(y), _padded(x)

    def one_block(group, start, count, sums):
        is_own = (jnp.arange(width, dtype=count.dtype) < count)[:, None]
        one, other = (jax.lax.dynamic_slice_in_dim(z, start, width) for z in (left, right))
        one = jnp.where(jnp.broadcast_to(is_own, one.shape), one, jnp.zeros_like(one))
        other = jnp.where(jnp.broadcast_to(is_own, other.shape), other, jnp.zeros_like(other))
        return sums.at[group].add(one.T @ other)

    zeros = jnp.zeros((len(sizes), y.shape[1], x.shape[1]), x.dtype)
    return _over_blocks(sizes, width, one_block, zeros, x)


def _padded(x: Float[Array, "rows width"]) -> tuple[Float[Array, "more width"], int]:
    """Rows with room for one more block, and the number of rows of a block."""
    width = max(1, min(BLOCK, len(x)))
    return jnp.pad(x, ((0, width), (0, 0))), width


def _over_blocks(
    sizes: Int[Array, " groups"],
    width: int,
    one_block: Callable[[Array, Array, Array, Array], Array],
    start: Array,
    like: Array,
) -> Array:
    """Runs `one_block` on every block in the order of the rows.

    It gets the block's group, its first row, and the rows of the group from there on.
    """
    blocks = (sizes + (width - 1)) // width
    last_block, last_row = (jnp.cumsum(x, dtype=x.dtype) for x in (blocks, sizes))

    def step(number, carry):
        group = (last_block <= number).sum(dtype=sizes.dtype)
        before = number - (last_block[group] - blocks[group])
        first = last_row[group] - sizes[group] + before * width
        return one_block(group, first, last_row[group] - first, carry)

    carry = vary_alike(start, like, sizes)[0]
    return jax.lax.fori_loop(jnp.zeros_like(last_block[-1]), last_block[-1], step, carry)
