"""The products of attention and their derivatives, a block of queries at a time.

`attended.py` makes one function of them, and `attention.py` makes the mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..._jax.by_platform import CPU
from ..._jax.dtypes import at_least_float32
from ..._jax.linear_map import per_tile
from ..._jax.mapped_axes import vary_alike
from ..._jax.microbatches import nearest_divisor

# Scores of one row held at once; there are as many rows as pairs. On a CPU they fit its cache,
# elsewhere they take 64 MiB of float32.
SCORES_AT_ONCE = {CPU: 2**19}
SCORES_AT_ONCE_ELSEWHERE = 2**24


def block_size(
    platform: str,
    query: Float[Array, "batch query key_heads groups head_width"],
    key: Float[Array, "batch key key_heads head_width"],
) -> int:
    """The number of queries in a block, which bounds the scores held at once."""
    length = query.shape[1]
    heads = query.shape[0] * query.shape[2] * query.shape[3]
    at_once = SCORES_AT_ONCE.get(platform, SCORES_AT_ONCE_ELSEWHERE)
    wanted = max(1.0, heads * length * key.shape[1] / at_once)
    count = nearest_divisor(length, wanted)
    # A length with few divisors is padded.
    return length // count if count / 2 <= wanted <= count * 2 else -(-length // round(wanted))


def forward(
    scale: float,
    softcap: float | None,
    size: int,
    query: Float[Array, "batch query key_heads groups head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    mask: Bool[Array, "query key"],
) -> tuple[
    Float[Array, "batch query key_heads groups head_width"],
    Float[Array, "batch query key_heads groups 1"],
]:
    """The output and the normaliser of each query's scores, in float32 or wider.

    The arguments are those of `attended`, and the number of queries in a block.
    """
    length = query.shape[1]

    def block(operands):
        query, mask = operands
        scores, factor = scores_of(scale, softcap, query, key, mask)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(factor * _at_most_zero(scores - peak))
        total = jnp.moveaxis(weights.sum(axis=-1, keepdims=True), 3, 1)
        product = _product("bskh,bkgts->btkgh", value, weights.astype(value.dtype))
        normaliser = factor * jnp.moveaxis(peak, 3, 1) + jnp.log(total)
        return (product / total).astype(value.dtype), normaliser

    output, normaliser = jax.lax.map(block, (_blocks(query, size, 1), _blocks(mask, size, 0)))
    return _unblocked(output, length), _unblocked(normaliser, length)


def push(scale, softcap, size, primals, results, tangents):
    r"""The tangents of the output and the normalisers, from those of query, key and value.

    With weights $P$ and tangents $dS$ of the scores, the tangent of a normaliser is the mean of
    $dS$ under $P$. The tangent of the output $O$ is $(P \circ dS) V + P\,dV$ minus that mean
    times $O$.
    """
    query, key, value, mask = primals
    (output, normaliser), (in_query, in_key, in_value) = results, tangents
    wide, narrow = normaliser.dtype, query.dtype

    @per_tile
    def block(operands):
        in_query, query, output, normaliser, mask = operands
        scores, factor = scores_of(scale, softcap, query, key, mask)
        weights = jnp.exp(factor * scores - jnp.transpose(normaliser, (0, 2, 3, 1, 4)))
        slopes = _product("bskh,btkgh->bkgts", key, in_query)
        slopes = scale * (slopes + _product("bskh,btkgh->bkgts", in_key, query))
        if softcap is not None:
            slopes = slopes * (1 - jnp.maximum(scores, -1) ** 2)
        slopes = weights * slopes
        mean = jnp.moveaxis(slopes.sum(axis=-1, keepdims=True), 3, 1)
        moved = _product("bskh,bkgts->btkgh", value, slopes.astype(narrow))
        moved = moved + _product("bskh,bkgts->btkgh", in_value, weights.astype(narrow))
        return (moved - mean * output.astype(wide)).astype(output.dtype), mean

    length = query.shape[1]
    operands = [_blocks(x, size, 1) for x in (in_query, query, output, normaliser)]
    blocks = jax.lax.map(block, (*operands, _blocks(mask, size, 0)))
    return tuple(_unblocked(x, length) for x in blocks)


def pull(scale, softcap, size, primals, results, cotangents):
    r"""The transpose of `push`; the cotangents of keys and values are in float32 or wider.

    With $P$ the weights, $O$ the output and $dN$ the normaliser's cotangent, the slope in a score
    is $P (dO V^T - dO \cdot O + dN)$.

    ??? cite

        Dao, *FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning*,
        2023 (arXiv 2307.08691), section 3.1.2.
    """
    query, key, value, mask = primals
    (output, normaliser), (cotangent, of_normaliser) = results, cotangents
    wide, narrow = normaliser.dtype, query.dtype
    mean = (cotangent.astype(wide) * output.astype(wide)).sum(axis=-1, keepdims=True)
    mean = mean - of_normaliser

    def block(sums, operands):
        query, cotangent, mean, normaliser, mask = operands
        mean, normaliser = (jnp.transpose(x, (0, 2, 4, 3, 1)) for x in (mean, normaliser))
        scores, factor = scores_of(scale, softcap, query, key, mask, keys_first=True)
        weights = jnp.exp(factor * scores - normaliser)
        slopes = scale * weights * (_product("btkgh,bskh->bksgt", cotangent, value) - mean)
        if softcap is not None:
            # The slope of tanh. Masked scores are below -1.
            slopes = slopes * (1 - jnp.maximum(scores, -1) ** 2)
        slopes, weights = slopes.astype(narrow), weights.astype(narrow)
        in_query = _product("bksgt,bskh->btkgh", slopes, key).astype(narrow)
        in_key = _product("btkgh,bksgt->bskh", query, slopes)
        in_value = _product("btkgh,bksgt->bskh", cotangent, weights)
        return jax.tree.map(jnp.add, sums, (in_key, in_value)), in_query

    length = query.shape[1]
    operands = [_blocks(x, size, 1) for x in (query, cotangent, mean, normaliser)]
    zeros = jnp.zeros_like(key, wide), jnp.zeros_like(value, wide)
    sums, in_query = jax.lax.scan(
        block, vary_alike(zeros, query)[0], (*operands, _blocks(mask, size, 0))
    )
    return _unblocked(in_query, length), *sums


def scores_of(scale, softcap, query, key, mask, *, keys_first=False) -> tuple[Array, float]:
    """The scores, in float32 or wider, and a factor; the softmax is of their product.

    The caller multiplies by the factor after it subtracts the largest score. XLA may or may not
    fuse an earlier product with the subtraction, so that its rounding would differ from program to
    program. The other arguments are those of `attended`.

    **Returns:**

    Scores of shape `(batch, key_heads, groups, query, key)`, or
    `(batch, key_heads, key, groups, query)` with `keys_first`, as the backward pass needs them; and
    the factor.
    """
    # This order of the operands, here and in `forward`, avoids copies that transpose the scores.
    if keys_first:
        products, mask = _product("btkgh,bskh->bksgt", query, key), mask.T[:, None]
    else:
        products = _product("bskh,btkgh->bkgts", key, query)
    return masked(scale, softcap, products, mask)


def masked(scale, softcap, products, mask) -> tuple[Array, float]:
    """What `scores_of` returns, from the products of queries and keys."""
    scores, factor = products, scale
    if softcap is not None:
        scores, factor = jnp.tanh(products * (scale / softcap)), softcap
    mask = jnp.broadcast_to(mask, scores.shape)
    # Finite, not -inf: a softmax is then finite even where a row is all masked.
    return jnp.where(mask, scores, jnp.finfo(scores.dtype).min / max(1.0, factor)), factor


def _at_most_zero(x: Array) -> Array:
    """`x` itself: no entry is above 0.

    On a CPU, XLA fuses the maximum, the difference and the exponential into a kernel with another
    exponential, but not if a gradient needs the maximum too. This clamp prevents that fusion, so
    that a policy and a reference with the same parameters agree to the last bit.
    """
    return jax.lax.clamp(jnp.finfo(x.dtype).min, x, jnp.zeros((), x.dtype))


def _product(form: str, one: Array, other: Array) -> Array:
    """An einsum that is accumulated and returned in float32 or wider."""
    return jnp.einsum(form, one, other, preferred_element_type=at_least_float32(one.dtype))


def _blocks(x: Array, size: int, axis: int) -> Array:
    """Blocks of neighbours along `axis`, padded with zeros, as a new first axis."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    blocked = jnp.pad(x, padding).reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(blocked, axis, 0)


def _unblocked(blocks: Array, length: int) -> Array:
    """The inverse of `_blocks` along the axis of queries."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])[:, :length]
