"""The unembedding, and its product with hidden states in tiles of tokens and vocabulary.

`tiling.py` chooses their sizes. `linear.py` and `kl.py` compute log-probabilities and divergences
from the logits of these tiles.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from .._jax.dtypes import at_least_float32
from .tiling import groups_of


class Unembedding(eqx.Module):
    """All that turns a hidden state into logits."""

    weight: Float[Array, "vocab width"]
    bias: Float[Array, " vocab"] | None
    softcap: float | int | None = eqx.field(static=True)

    @staticmethod
    def of(
        weight: Array | np.ndarray, bias: Array | np.ndarray | None, softcap: float | int | None
    ) -> "Unembedding":
        """An unembedding from arrays of JAX or NumPy."""
        return Unembedding(
            jnp.asarray(weight), None if bias is None else jnp.asarray(bias), softcap
        )

    def logits(self, hidden: Float[Array, "chunk width"]) -> Float[Array, "chunk vocab"]:
        """The logits, accumulated and returned in float32 or wider."""
        wide = at_least_float32(hidden.dtype)
        logits = jnp.einsum(
            "tw,vw->tv", hidden, self.weight.astype(hidden.dtype), preferred_element_type=wide
        )
        logits = logits if self.bias is None else logits + self.bias.astype(wide)[None]
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def pull(
        self,
        hidden: Float[Array, "chunk width"],
        logits: Float[Array, "chunk vocab"],
        slopes: Float[Array, "chunk vocab"],
    ) -> tuple["Unembedding", Float[Array, "chunk width"]]:
        """The pullback of `logits`: from its cotangent `slopes` those of `self` and `hidden`.

        They are in float32 or wider.
        """
        wide = logits.dtype
        if self.softcap is not None:
            # The slope of tanh. A logit of -inf belongs to another tile, and its slope is 0.
            slopes = slopes * (1 - jnp.maximum(logits / self.softcap, -1) ** 2)
        narrow, weight = slopes.astype(hidden.dtype), self.weight.astype(hidden.dtype)
        in_hidden = jnp.einsum("tv,vw->tw", narrow, weight, preferred_element_type=wide)
        in_weight = jnp.einsum("tv,tw->vw", narrow, hidden, preferred_element_type=wide)
        in_bias = None if self.bias is None else slopes.sum(axis=0)
        return Unembedding(in_weight, in_bias, self.softcap), in_hidden


def check_head(
    hidden: Array | np.ndarray,
    unembedding: Array | np.ndarray,
    softcap: float | int | None,
    side: str = "",
) -> None:
    """Raises `ValueError` if the arguments, whose names begin with `side`, do not fit together."""
    if unembedding.ndim != 2 or unembedding.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"`{side}unembedding` must have shape `(vocab, width)` with the width of "
            f"`{side}hidden`, {hidden.shape[-1]}; got {unembedding.shape}."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`{side}softcap` must be a positive number or None, got {softcap}.")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises `ValueError` if it is not a number of tokens."""
    if chunk_size is not None and not chunk_size > 0:
        raise ValueError(f"`chunk_size` must be positive or None, got {chunk_size}.")


class Tile(NamedTuple):
    """A part of the vocabulary: some rows of the unembedding, and the ids of their tokens.

    Rows that an earlier part contains already have the id -1 and logits of -inf.
    """

    head: Unembedding
    ids: Int[Array, " part"]
    is_own: Bool[Array, " part"] | None

    def logits(self, hidden: Float[Array, "chunk width"]) -> Float[Array, "chunk part"]:
        logits = self.head.logits(hidden)
        return logits if self.is_own is None else jnp.where(self.is_own[None], logits, -jnp.inf)

    def holds(self, targets: Int[Array, " chunk"]) -> Bool[Array, "chunk part"]:
        """Marks each target's row, by a comparison: a gather would not keep shards local."""
        return targets[:, None] == self.ids[None]


def tile_at(
    head: Unembedding,
    index: Int[Array, ""],
    parts: int,
    dtype: DTypeLike,
    axis_name: str | None,
) -> Tile:
    """One part of the vocabulary of this device."""
    vocab = head.weight.shape[0]
    groups = groups_of(vocab)
    rows = vocab // groups
    size = -(-rows // parts)
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name).astype(dtype)
    place = _first(rows, parts, index).astype(dtype) + jnp.arange(size, dtype=dtype)
    group = device * groups + jnp.arange(groups, dtype=dtype)
    ids = (group[:, None] * rows + place[None]).reshape(-1)
    # A CPU slices bf16 by way of float32. The barrier makes the head depend on the index, so that
    # XLA cannot widen all of it before the loop.
    head, index = jax.lax.optimization_barrier((head, index))
    tile = part_at(head, index, parts)
    if rows % parts == 0:
        return Tile(tile, ids, None)
    is_own = jnp.broadcast_to(place >= index.astype(dtype) * size, (groups, size)).reshape(-1)
    return Tile(tile, jnp.where(is_own, ids, -1), is_own)


def part_at(head: Unembedding, index: Int[Array, ""], parts: int) -> Unembedding:
    """The rows of one part: its share of every group."""

    def rows_of(x):
        grouped = _grouped(x)
        size = -(-grouped.shape[1] // parts)
        first = _first(grouped.shape[1], parts, index)
        rows = jax.lax.dynamic_slice_in_dim(grouped, first, size, axis=1)
        return rows.reshape(-1, *x.shape[1:])

    return jax.tree.map(rows_of, head)


def put_back(
    head: Unembedding, in_tile: Unembedding, index: Int[Array, ""], parts: int
) -> Unembedding:
    """`head` with the rows of one part replaced, except rows that an earlier part has replaced."""

    def put(x, rows):
        grouped = _grouped(x)
        size = -(-grouped.shape[1] // parts)
        first = _first(grouped.shape[1], parts, index)
        rows = rows.astype(x.dtype).reshape(-1, size, *x.shape[1:])
        if grouped.shape[1] % parts:
            before = jax.lax.dynamic_slice_in_dim(grouped, first, size, axis=1)
            is_own = first + jnp.arange(size) >= index * size
            rows = jnp.where(is_own.reshape(1, -1, *[1] * (x.ndim - 1)), rows, before)
        put = jax.lax.dynamic_update_slice_in_dim(grouped, rows, first, axis=1)
        return put.reshape(x.shape)

    return jax.tree.map(put, head, in_tile)


def _grouped(x: Array) -> Array:
    return x.reshape(groups_of(x.shape[0]), -1, *x.shape[1:])


def _first(rows: int, parts: int, index: Int[Array, ""]) -> Int[Array, ""]:
    """The first row of a part in each group; the last part starts early to have the same size."""
    size = -(-rows // parts)
    return jnp.minimum(index * size, rows - size)


def fold(
    add: Callable[..., Any],
    state: Any,
    heads: Any,
    parts: int,
    rows: Sequence[Array],
    axis_name: str | None = None,
) -> Any:
    """`state = add(tiles, state, *rows)` over all parts of the vocabulary, chunk by chunk.

    **Arguments:**

    - `add`: adds one tile to the state of one chunk of tokens.
    - `state`: arrays of shape `(count, chunk, ...)`.
    - `heads`: an unembedding, or a pytree of several; `tiles` has a tile of each in its place.
    - `parts`: the number of parts of the vocabulary.
    - `rows`: arrays of tokens, `(count, chunk, ...)`. The last has the dtype of the ids if it has
        integers.
    - `axis_name`: a mapped axis over which the vocabulary is sharded.
    """
    ids = rows[-1].dtype if jnp.issubdtype(rows[-1].dtype, jnp.integer) else jnp.int32

    def one_part(state, index):
        tiles = jax.tree.map(
            lambda head: tile_at(head, index, parts, ids, axis_name),
            heads,
            is_leaf=lambda x: isinstance(x, Unembedding),
        )
        return jax.lax.map(lambda operands: add(tiles, *operands), (state, *rows)), None

    return jax.lax.scan(one_part, state, jnp.arange(parts))[0]


def raised(
    peak: Float[Array, " chunk"], logits: Float[Array, "chunk part"]
) -> tuple[Float[Array, " chunk"], Float[Array, " chunk"], Float[Array, " chunk"]]:
    """A step of an online softmax: the new largest logit, and what its sums need.

    **Returns:**

    The largest logit so far, a finite offset near it to subtract from logits, and the factor that
    takes earlier sums to that offset.
    """
    highest = jnp.maximum(peak, jax.lax.stop_gradient(logits).max(axis=-1))
    offset = jnp.where(jnp.isfinite(highest), highest, 0)
    return highest, offset, jnp.exp(peak - offset)


def over_devices(
    peak: Array, sums: tuple[Array, ...], axis_name: str | None
) -> tuple[Array, tuple[Array, ...]]:
    """The largest logit of all tiles, NaN if it is not finite, and the sums relative to it.

    `sums` are those of an online softmax over this device's part of the vocabulary.
    """
    if axis_name is not None:
        highest = jax.lax.pmax(jax.lax.stop_gradient(peak), axis_name)
        shrunk = jnp.exp(peak - jnp.where(jnp.isfinite(highest), highest, 0))
        peak, sums = highest, jax.lax.psum(tuple(x * shrunk for x in sums), axis_name)
    return jnp.where(jnp.isfinite(peak), peak, jnp.nan), sums
