"""Attention with JAX's splash kernel for TPUs, which keeps no scores in memory.

`kernels.py` chooses it, and runs it on a mesh.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .how import How
from .parts import Widths

# Whether the kernel runs on a CPU, step by step, as tests do.
INTERPRET = False
# A TPU computes with registers of 128 numbers, and the kernel with blocks of such widths.
LANES = 128
LARGEST_BLOCK = 512


def fits(how: How, query: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernel supports arrays of these shapes, as in `attended`, on a TPU.

    The mask is a static one, and segments of keys beside it.
    """
    return (
        how.form in ("causal", "keys")
        and query.dtype in (jnp.bfloat16, jnp.float32)
        and query.shape[-1] % 8 == 0
    )


def attention(
    how: How,
    query: Float[Array, "batch query heads head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    *mask: Bool[Array, "batch query key"],
) -> Float[Array, "batch query heads head_width"]:
    """Attention with grouped heads, on one device."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    queries, keys = query.shape[1], key.shape[1]
    # The kernel has no scale, and heads in front of the length.
    query = (query * how.scale).astype(query.dtype)
    padded = (_padded(jnp.swapaxes(x, 1, 2)) for x in (query, key, value))
    run = jax.vmap(_kernel(how.softcap, queries, keys, query.shape[2]))
    # The last query sees all keys that any query sees.
    segments = [SegmentIds(*_segments(x[:, -1], queries)) for x in mask]
    return jnp.swapaxes(run(*padded, *segments), 1, 2)[:, :queries]


def prefers_sequences(widths: Widths) -> bool:
    """No: the kernel leaves out the blocks that a static mask hides."""
    return False


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Where the kernel is traced: its own code mixes dtypes, ranks and the sizes of integers."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def _kernel(softcap: float | None, queries: int, keys: int, heads: int) -> Callable[..., Any]:
    """The kernel of one row, whose last query sees the last key."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block_q, block_kv = _block(queries), _block(keys)
    shape = _whole(queries), _whole(keys)
    mask = splash.CausalMask(shape, offset=keys - queries)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        interpret=INTERPRET,
    )


def _segments(
    seen: Bool[Array, "batch key"], queries: int
) -> tuple[Int[Array, "batch padded_query"], Int[Array, "batch padded_key"]]:
    """Segment 1 for all queries and for the keys that some query sees, 0 for all other keys."""
    behind = _whole(seen.shape[1]) - seen.shape[1]
    keys = jnp.pad(seen, [(0, 0), (0, behind)]).astype(jnp.int32)
    return jnp.ones((keys.shape[0], _whole(queries)), jnp.int32), keys


def _block(length: int) -> int:
    """The width of the blocks: as few as possible, with little padding."""
    count = -(-length // LARGEST_BLOCK)
    return -(-length // (count * LANES)) * LANES


def _whole(length: int) -> int:
    """The length with padding, a multiple of the width of the blocks."""
    return -(-length // _block(length)) * _block(length)


def _padded(x: Float[Array, "batch heads length head_width"]) -> Array:
    behind = _whole(x.shape[2]) - x.shape[2]
    return jnp.pad(x, [(0, 0), (0, 0), (0, behind), (0, 0)])
