"""The unembedding, and the vocabulary and the tokens in tiles: what is multiplied at a time.

What is made of the logits of a tile is in `linear.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from .log_probs import at_least_float32
from .strided import nearest_divisor, split

# Logits held at once. A CPU is fastest where they stay in its cache, in 8 MiB of float32; an
# accelerator where a product is large enough to fill it, here 256 MiB.
LOGITS_AT_ONCE = {"cpu": 2**21}
LOGITS_AT_ONCE_ELSEWHERE = 2**26
# Tokens at once where the caller does not choose. With more, the part of the vocabulary that
# goes with them gets thin.
TOKENS_AT_ONCE = 4096


class Unembedding(eqx.Module):
    """All that turns a hidden state into logits."""

    weight: Float[Array, "vocab width"]
    bias: Float[Array, " vocab"] | None
    softcap: float | int | None = eqx.field(static=True)

    @staticmethod
    def of(
        weight: Array | np.ndarray, bias: Array | np.ndarray | None, softcap: float | int | None
    ) -> "Unembedding":
        """Of arrays of NumPy, too."""
        return Unembedding(
            jnp.asarray(weight), None if bias is None else jnp.asarray(bias), softcap
        )

    def logits(self, hidden: Float[Array, "chunk width"]) -> Float[Array, "chunk vocab"]:
        """In float32 or wider, accumulated there too."""
        wide = at_least_float32(hidden.dtype)
        logits = jnp.einsum(
            "tw,vw->tv", hidden, self.weight.astype(hidden.dtype), preferred_element_type=wide
        )
        logits = logits if self.bias is None else logits + self.bias.astype(wide)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def pull(
        self,
        hidden: Float[Array, "chunk width"],
        logits: Float[Array, "chunk vocab"],
        slopes: Float[Array, "chunk vocab"],
    ) -> tuple["Unembedding", Float[Array, "chunk width"]]:
        """What slopes in the logits are in `self` and in `hidden`, in float32 or wider."""
        wide = logits.dtype
        if self.softcap is not None:
            slopes = slopes * (1 - (logits / self.softcap) ** 2)
        narrow, weight = slopes.astype(hidden.dtype), self.weight.astype(hidden.dtype)
        in_hidden = jnp.einsum("tv,vw->tw", narrow, weight, preferred_element_type=wide)
        in_weight = jnp.einsum("tv,tw->vw", narrow, hidden, preferred_element_type=wide)
        in_bias = None if self.bias is None else slopes.sum(axis=0)
        return Unembedding(in_weight, in_bias, self.softcap), in_hidden


def check_head(hidden, unembedding, softcap, side: str = "") -> None:
    """Raises where these do not fit each other; the names of the arguments begin with `side`."""
    if unembedding.ndim != 2 or unembedding.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"`{side}unembedding` must have shape `(vocab, width)` with the width of "
            f"`{side}hidden`, {hidden.shape[-1]}; got {unembedding.shape}."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`{side}softcap` must be a positive number or None, got {softcap}.")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises where it is no number of tokens."""
    if chunk_size is not None and not chunk_size > 0:
        raise ValueError(f"`chunk_size` must be positive or None, got {chunk_size}.")


class Tile(NamedTuple):
    """A part of the vocabulary: its rows of the unembedding, and which tokens they are."""

    head: Unembedding
    ids: Int[Array, " part"]


def in_chunks(chunk_size: int | None, vocab: int, *arrays: Array) -> tuple[tuple[Array, ...], int]:
    """Arrays of tokens in chunks, `(count, chunk, ...)`, and the parts of the vocabulary.

    The first array has the width as its last axis, the others have one entry for each token.
    """
    tokens = arrays[0][..., 0].size
    most = min(tokens, chunk_size or TOKENS_AT_ONCE)
    at_once = LOGITS_AT_ONCE.get(jax.default_backend(), LOGITS_AT_ONCE_ELSEWHERE)
    parts = _parts(vocab, most * vocab / at_once)
    # Parts of a vocabulary with few divisors may be large: it is then fewer tokens.
    most = max(1, min(most, 4 * at_once * parts // vocab))
    count = max(1, -(-tokens // most))
    flat = [x.reshape(tokens, *x.shape[arrays[0].ndim - 1 :]) for x in arrays]
    rows = tuple(
        split(jnp.pad(x, [(0, -tokens % count)] + [(0, 0)] * (x.ndim - 1)), count) for x in flat
    )
    return rows, parts


def _parts(vocab: int, wanted: float) -> int:
    """About as many equal parts as wanted, each of a multiple of eight rows where `vocab` is one.

    Up to eight devices can then hold an equal share of each part.
    """
    return nearest_divisor(vocab // 8 if vocab % 8 == 0 else vocab, wanted)


def tile_at(
    head: Unembedding,
    index: Int[Array, ""],
    parts: int,
    dtype: DTypeLike,
    axis_name: str | None,
) -> Tile:
    """Every `parts`-th row from `index` on: with stride, as in `strided.py`, and for its reason."""
    vocab = head.weight.shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name).astype(dtype) * vocab
    ids = jnp.arange(0, vocab, parts, dtype=dtype) + index.astype(dtype) + first
    return Tile(jax.tree.map(lambda x: _every(parts, x, index), head), ids)


def _every(parts: int, x: Array, index: Int[Array, ""]) -> Array:
    """Rows `index::parts`."""
    # A CPU slices bf16 by way of float32. That `x` seems to depend on the index keeps XLA from
    # widening all of it once, before the loop.
    x, index = jax.lax.optimization_barrier((x, index))
    x = x.reshape(-1, parts, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)


def put_back(
    head: Unembedding, in_tile: Unembedding, index: Int[Array, ""], parts: int
) -> Unembedding:
    """`head` with the rows of one tile."""

    def put(x, rows):
        split = x.reshape(-1, parts, *x.shape[1:])
        rows = rows.astype(x.dtype)
        return jax.lax.dynamic_update_index_in_dim(split, rows, index, axis=1).reshape(x.shape)

    return jax.tree.map(put, head, in_tile)


def fold(
    add: Callable[..., Any],
    state: Any,
    head: Unembedding,
    parts: int,
    rows: Sequence[Array],
    axis_name: str | None = None,
) -> Any:
    """`state = add(tile, state, *rows)` over all parts of the vocabulary, chunk by chunk."""
    ids = rows[-1].dtype if len(rows) > 1 else jnp.int32

    def one_part(state, index):
        tile = tile_at(head, index, parts, ids, axis_name)
        return jax.lax.map(lambda operands: add(tile, *operands), (state, *rows)), None

    return jax.lax.scan(one_part, state, jnp.arange(parts))[0]
