"""Attention with cuDNN's fused kernel, which keeps no scores in memory.

For all other devices, dtypes and shapes, `blockwise.py` computes the same function.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from ..._jax.by_platform import assumed_kernel
from ..._jax.linear_map import with_transpose
from ..._jax.partitioning import mesh_of
from .blockwise import ATTENDED, blockwise

KERNEL = "cudnn"
# The widest head for which cuDNN has a gradient on every GPU since Ampere.
WIDEST_HEAD = 128


def fits(query: Array, key: Array, softcap: float | None) -> bool:
    """Whether the kernel supports these arrays: half precision, even lengths, no soft cap, NVIDIA.

    It is false under automatic partitioning over several devices: JAX then requires one sharding
    for queries and keys, which grouped heads need not have. The shapes are as in `fused`.
    """
    (length, _, head_width), keys = query.shape[1:], key.shape[1]
    mesh = mesh_of(query)
    return (
        has_kernel()
        and (mesh is None or mesh.size == 1)
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and softcap is None
        and head_width % 8 == 0
        and head_width <= WIDEST_HEAD
        # With a mask, the kernel's gradient requires even lengths.
        and length % 2 == keys % 2 == 0
    )


def has_kernel() -> bool:
    """Whether the default device of JAX is an NVIDIA GPU of the Ampere generation or later.

    Inside `assume_kernel`, that decides.
    """
    assumed = assumed_kernel()
    if assumed is not None:
        return assumed
    device = jax.devices()[0]
    on_cuda = jax.default_backend() == "gpu" and "cuda" in device.client.platform_version
    return on_cuda and float(device.compute_capability) >= 8


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def fused(
    scale: float,
    query: Float[Array, "batch query heads head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    mask: Bool[Array, "query key"] | None,
) -> Float[Array, "batch query heads head_width"]:
    """Attention with grouped heads.

    The gradient runs the kernel's forward pass again, since the kernel's backward pass needs its
    residuals. The kernel has no forward mode and no second derivative: `blockwise` computes those.

    **Arguments:**

    - `scale`: the factor of the scores.
    - `query`, `key`, `value`: in half precision. `heads` is a multiple of `key_heads`.
    - `mask`: true where a query sees a key; `None` for a causal mask.
    """
    return _merging(partial(_attention, scale))(_batched(mask, query), query, key, value)


@fused.defjvp
def _fused_jvp(scale, primals, tangents):
    operands, mask = primals[:3], primals[3]
    output = checkpoint_name(fused(scale, *primals), ATTENDED)

    def push(tangents):
        return jax.jvp(partial(_unfused, scale, mask), operands, tangents)[1]

    def pull(cotangent):
        def of_kernel(cotangent, mask, *operands):
            return jax.vjp(partial(_attention, scale, mask), *operands)[1](cotangent)

        return tuple(_merging(of_kernel)(cotangent, _batched(mask, operands[0]), *operands))

    return output, with_transpose(push, pull, tuple(tangents[:3]), output)


def _unfused(
    scale: float,
    mask: Bool[Array, "query key"] | None,
    query: Float[Array, "batch query heads head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
) -> Float[Array, "batch query heads head_width"]:
    if mask is None:
        mask = jnp.tri(query.shape[1], dtype=bool)
    grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    return blockwise(scale, None, grouped, key, value, mask).reshape(query.shape)


def _batched(
    mask: Bool[Array, "query key"] | None, query: Float[Array, "batch query heads head_width"]
) -> Bool[Array, "batch 1 query key"] | None:
    return None if mask is None else jnp.broadcast_to(mask, (query.shape[0], 1, *mask.shape))


def _attention(
    scale: float,
    mask: Bool[Array, "batch 1 query key"] | None,
    query: Float[Array, "batch query heads head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
) -> Float[Array, "batch query heads head_width"]:
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=mask is None, scale=scale, implementation=KERNEL
    )


def _merging(function: Callable) -> Callable:
    """`function` of arrays with a batch axis, whose `vmap` rule merges the new axis into it.

    JAX's own rule for the kernel fails on a mask.
    """
    merging = custom_vmap(function)

    @merging.def_vmap
    def of_more(count, is_batched, *operands):
        def merged(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (count, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = merging(*jax.tree.map(merged, operands, tuple(is_batched)))
        split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return merging
