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

# Scores held at once. On a CPU they fit its cache. Elsewhere they take 64 MiB of float32, for each
# of as many rows as there are pairs.
SCORES_AT_ONCE = {CPU: 2**19}
SCORES_AT_ONCE_ELSEWHERE = 2**24


def scores_at_once(platform: str) -> int:
    """About how many scores are held at once on a platform."""
    return SCORES_AT_ONCE.get(platform, SCORES_AT_ONCE_ELSEWHERE)


def block_size(platform: str, heads: int, queries: int, keys: int) -> int:
    """The number of queries in a block of the heads that run at once."""
    wanted = max(1.0, heads * queries * keys / scores_at_once(platform))
    count = nearest_divisor(queries, wanted)
    # A length with few divisors is padded.
    return queries // count if count / 2 <= wanted <= count * 2 else -(-queries // round(wanted))


def forward(
    scale: float,
    softcap: float | None,
    size: int,
    query: Float[Array, "query groups head_width"],
    key: Float[Array, "key head_width"],
    value: Float[Array, "key head_width"],
    mask: Bool[Array, "query key"],
) -> tuple[Float[Array, "query groups head_width"], Float[Array, "query groups 1"]]:
    """The output and the normaliser of each query's scores, in float32 or wider.

    The arguments are those of `attended` for one row and one key head, and the number of queries
    in a block.
    """
    length = query.shape[0]

    def block(operands):
        query, mask = operands
        scores, factor = scores_of(scale, softcap, query, key, mask)
        peak = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(factor * _at_most_zero(scores - peak))
        total = weights.sum(axis=-1, keepdims=True)
        product = _product("tgs,sh->tgh", weights.astype(value.dtype), value)
        return (product / total).astype(value.dtype), factor * peak + jnp.log(total)

    output, normaliser = jax.lax.map(block, (_blocks(query, size), _blocks(mask, size)))
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
        weights = jnp.exp(factor * scores - normaliser)
        slopes = _product("tgh,sh->tgs", in_query, key) + _product("tgh,sh->tgs", query, in_key)
        slopes = scale * slopes
        if softcap is not None:
            slopes = slopes * (1 - jnp.maximum(scores, -1) ** 2)
        slopes = weights * slopes
        mean = slopes.sum(axis=-1, keepdims=True)
        moved = _product("tgs,sh->tgh", slopes.astype(narrow), value)
        moved = moved + _product("tgs,sh->tgh", weights.astype(narrow), in_value)
        return (moved - mean * output.astype(wide)).astype(output.dtype), mean

    length = query.shape[0]
    operands = in_query, query, output, normaliser, mask
    blocks = jax.lax.map(block, tuple(_blocks(x, size) for x in operands))
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
        mean, normaliser = (jnp.transpose(x, (2, 0, 1)) for x in (mean, normaliser))
        scores, factor = scores_of(scale, softcap, query, key, mask, keys_first=True)
        weights = jnp.exp(factor * scores - normaliser)
        slopes = scale * weights * (_product("sh,tgh->stg", value, cotangent) - mean)
        if softcap is not None:
            # The slope of tanh. Masked scores are below -1.
            slopes = slopes * (1 - jnp.maximum(scores, -1) ** 2)
        slopes, weights = slopes.astype(narrow), weights.astype(narrow)
        in_query = _product("stg,sh->tgh", slopes, key).astype(narrow)
        in_key = _product("stg,tgh->sh", slopes, query)
        in_value = _product("stg,tgh->sh", weights, cotangent)
        return jax.tree.map(jnp.add, sums, (in_key, in_value)), in_query

    length = query.shape[0]
    operands = tuple(_blocks(x, size) for x in (query, cotangent, mean, normaliser, mask))
    zeros = jnp.zeros_like(key, wide), jnp.zeros_like(value, wide)
    sums, in_query = jax.lax.scan(block, vary_alike(zeros, query)[0], operands)
    return _unblocked(in_query, length), *sums


def scores_of(scale, softcap, query, key, mask, *, keys_first=False) -> tuple[Array, float]:
    """The scores, in float32 or wider, and a factor; the softmax is of their product.

    The caller multiplies by the factor after it subtracts the largest score. XLA may or may not
    fuse an earlier product with the subtraction, so that its rounding would differ from program to
    program. The other arguments are those of `forward`.

    **Returns:**

    Scores of shape `(query, groups, key)`, or `(key, query, groups)` with `keys_first`, as the
    backward pass needs them; and the factor.
    """
    if keys_first:
        products, mask = _product("sh,tgh->stg", key, query), mask.T[:, :, None]
    else:
        products, mask = _product("tgh,sh->tgs", query, key), mask[:, None, :]
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


def _blocks(x: Array, size: int) -> Array:
    """Blocks of neighbours along the first axis, padded with zeros."""
    padding = [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, size, *x.shape[1:])


def _unblocked(blocks: Array, length: int) -> Array:
    """The inverse of `_blocks`."""
    return blocks.reshape(-1, *blocks.shape[2:])[:length]
