"""Attention with cuDNN's fused kernel, which keeps no scores in memory.

`kernels.py` chooses it, and runs it on a mesh.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..._jax.gpus import as_if_cudnn_were_here, capability
from . import sequences
from .how import How
from .parts import Widths

IMPLEMENTATION = "cudnn"
# cuDNN has a gradient for heads of 256 on Hopper, and of 128 on every GPU since Ampere.
_HOPPER = 9
_WIDEST_HEAD_OF_HOPPER, _WIDEST_HEAD = 256, 128
# The time of the kernel with a mask, relative to the kernel that sees all keys: 1.45 to 1.5 on an
# H200, forward and with the gradient, for heads of 64 and 128.
_MASK_COST = 1.5


def fits(how: How, query: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernel supports arrays of these shapes, as in `attended`, on the GPU."""
    head_width, (generation, _) = query.shape[-1], capability()
    widest = _WIDEST_HEAD_OF_HOPPER if generation == _HOPPER else _WIDEST_HEAD
    return (
        generation >= 8
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and how.softcap is None
        and head_width % 8 == 0
        and head_width <= widest
    )


def attention(
    how: How,
    query: Float[Array, "batch query heads head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    *mask: Bool[Array, "batch query key"],
) -> Float[Array, "batch query heads head_width"]:
    """Attention with grouped heads, on one device."""
    length = query.shape[1]
    # With a mask, the kernel's gradient requires even lengths.
    query, key, value = (_padded(x, (1,)) for x in (query, key, value))
    # No query sees the key behind the last, and nobody reads the query behind the last.
    masks = [_padded(x, (1, 2))[:, None] for x in mask]
    output = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=masks[0] if masks else None,
        is_causal=not masks,
        scale=how.scale,
        implementation=IMPLEMENTATION,
    )
    return output[:, :length]


def prefers_sequences(widths: Widths) -> bool:
    """Whether the causal kernel is faster on sequences than kernels with masks on parts."""
    return sequences.pay(widths, _MASK_COST)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Where the kernel is traced: its own code mixes dtypes, and asks for the GPU."""
    with as_if_cudnn_were_here(), jax.numpy_dtype_promotion("standard"):
        yield


def _padded(x: Array, axes: tuple[int, ...]) -> Array:
    """`x` with zeros behind it along axes of odd length."""
    behind = [(0, x.shape[axis] % 2 if axis in axes else 0) for axis in range(x.ndim)]
    return jnp.pad(x, behind) if any(odd for _, odd in behind) else x
