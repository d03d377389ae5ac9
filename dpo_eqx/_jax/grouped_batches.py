"""The products of `grouped_dot.py` on NVIDIA GPUs, all blocks of rows at once.

There, XLA multiplies every row by every matrix for JAX's own `ragged_dot`. Here each group is
padded to whole blocks, and each block meets a copy of the matrix of its group. The functions have
no derivatives.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# On an H200 a matrix is copied in the time of its products with about so many rows.
ROWS_OF_A_COPY = 400


def dot_in_batches(
    x: Float[Array, "rows in"],
    matrices: Float[Array, "groups out in"],
    sizes: Int[Array, " groups"],
) -> Float[Array, "rows out"]:
    """Each row times the matrix of its group, as by `dot_by_blocks`."""
    blocks = _blocks(len(x), sizes)
    products = jnp.einsum("bri,boi->bro", blocks.of(x), matrices[blocks.group])
    return products.reshape(-1, products.shape[2])[blocks.place]


def outer_in_batches(
    y: Float[Array, "rows out"], x: Float[Array, "rows in"], sizes: Int[Array, " groups"]
) -> Float[Array, "groups out in"]:
    """For each group, the sum of `outer(y[i], x[i])` over its rows, as by `outer_by_blocks`."""
    blocks = _blocks(len(x), sizes)
    products = jnp.einsum("bro,bri->boi", blocks.of(y), blocks.of(x))
    # A product, not a scatter of sums, which a GPU adds in a different order every time.
    is_member = blocks.group[None] == jnp.arange(len(sizes), dtype=sizes.dtype)[:, None]
    return jnp.einsum("gb,boi->goi", is_member.astype(x.dtype), products)


class _Blocks(NamedTuple):
    """Rows in blocks of one group each, in the order of the groups.

    - `group`: the group of each block. Blocks at the end may have no rows.
    - `row`: the row at each place of each block, if `is_row`.
    - `place`: the place of each row, counted over all blocks.
    """

    group: Int[Array, " blocks"]
    row: Int[Array, "blocks block"]
    is_row: Bool[Array, "blocks block"]
    place: Int[Array, " rows"]

    def of(self, x: Float[Array, "rows width"]) -> Float[Array, "blocks block width"]:
        """The rows of `x` in blocks, and zeros at other places."""
        return jnp.where(self.is_row[..., None], x[self.row], 0)


def _blocks(rows: int, sizes: Int[Array, " groups"]) -> _Blocks:
    def arange(size):
        return jnp.arange(size, dtype=sizes.dtype)

    groups, width = len(sizes), _width(rows, len(sizes))
    count = min((rows + groups * (width - 1)) // width, rows)
    blocks = (sizes + (width - 1)) // width
    end_block, end_row = (jnp.cumsum(x, dtype=x.dtype) for x in (blocks, sizes))
    first_block, first_row = end_block - blocks, end_row - sizes
    # Numbers behind all groups count to the last.
    group = jnp.repeat(arange(groups), blocks, total_repeat_length=count)
    start = first_row[group] + (arange(count) - first_block[group]) * width
    row = start[:, None] + arange(width)[None]
    is_row = row < end_row[group][:, None]
    of_row = jnp.repeat(arange(groups), sizes, total_repeat_length=rows)
    place = first_block[of_row] * width + arange(rows) - first_row[of_row]
    # Rows behind those of all groups have no place, and nothing reads what they get.
    place = jnp.minimum(place, count * width - 1)
    return _Blocks(group, jnp.clip(row, 0, rows - 1), is_row, place)


def _width(rows: int, groups: int) -> int:
    """The rows of a block, a power of 2: fewer copy more matrices, and more pad more rows.

    The sum of both is least at the square root. There are no more than a group has on average, so
    that at most about half of the places are padding.
    """
    mean = rows / groups
    return 1 << int(math.log2(max(1, min(mean, math.sqrt(ROWS_OF_A_COPY * mean)))))
