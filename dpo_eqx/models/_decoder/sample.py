"""Chooses the next token from logits: greedy, or sampled with temperature, top-k, top-p and min-p.

`generate.py` computes the logits. Nothing here sorts them, or draws a random number for each: on a
CPU, that takes longer than a layer.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped, UInt

from ..._jax.dtypes import at_least_float32
from ..._jax.scalars import Number


def choose(
    logits: Float[Array, " vocab"],
    key: PRNGKeyArray | None,
    *,
    temperature: Number,
    top_k: int | None,
    top_p: Number | None,
    min_p: Number | None = None,
) -> Int[Array, ""]:
    """The id of the next token: sampled, or without a key the likeliest."""
    logits = logits.astype(at_least_float32(logits.dtype))
    if key is None:
        return likeliest(logits)
    logits = logits / jnp.asarray(temperature, logits.dtype)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return id_at(logits, jax.random.uniform(key, dtype=logits.dtype))


def likeliest(logits: Float[Array, " vocab"]) -> Int[Array, ""]:
    """The first id with the largest logit; the last id if one is NaN."""
    # On CPUs, `argmax` takes four times as long.
    ids = jnp.arange(logits.size, dtype=jnp.int32)
    return jnp.where(logits == logits.max(), ids, logits.size - 1).min()


def id_at(logits: Float[Array, " vocab"], place: Float[Array, ""]) -> Int[Array, ""]:
    """The id at a place from 0 to 1, exclusively, in the distribution function of the softmax.

    At a uniform place, it is a draw from the softmax. An id whose logit is -inf is at no place.
    """
    # The sums of blocks of ids first, and then those within one block.
    size = math.isqrt(logits.size - 1) + 1
    count = -(-logits.size // size)
    shares = jnp.pad(jnp.exp(logits - logits.max()), (0, count * size - logits.size))
    shares = shares.reshape(count, size)
    sums = jnp.cumsum(shares.sum(axis=1))
    goal = place * sums[-1]
    block = (sums <= goal).sum(dtype=jnp.int32)
    goal = goal - jnp.where(block > 0, sums[block - 1], 0)
    sums = jnp.cumsum(shares[block])
    # Below the sum of the block, which may be rounded differently here.
    goal = jnp.minimum(goal, sums[-1] * (1 - jnp.finfo(sums.dtype).eps))
    return block * size + (sums <= goal).sum(dtype=jnp.int32)


def keep_top_k(logits: Float[Array, " vocab"], top_k: int) -> Float[Array, " vocab"]:
    """The logits with -inf for all but the `top_k` largest; ties with the smallest of them stay."""
    ones = jnp.ones(logits.shape, jnp.int32)
    return _keep_below(logits, ones, jnp.asarray(top_k, jnp.int32))


def keep_top_p(logits: Float[Array, " vocab"], top_p: Number) -> Float[Array, " vocab"]:
    """The logits with -inf for all but the fewest tokens whose probabilities sum to `top_p`.

    Ties with the least likely of them stay.
    """
    return _keep_below(logits, jax.nn.softmax(logits), jnp.asarray(top_p, logits.dtype))


def _keep_below(
    logits: Float[Array, " vocab"], amounts: Shaped[Array, " vocab"], limit: Shaped[Array, ""]
) -> Float[Array, " vocab"]:
    """The logits with -inf for each token whose likelier tokens have `limit` or more in sum."""
    order = _order(logits)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        stays = jnp.where(order > middle, amounts, 0).sum(dtype=limit.dtype) < limit
        return jnp.where(stays, low, middle + 1), jnp.where(stays, middle, high)

    # By bisection over the bits of a logit: the least one that stays.
    bounds = order.min(), order.max()
    least, _ = jax.lax.fori_loop(0, jnp.iinfo(order.dtype).bits, halve, bounds)
    return jnp.where(order >= least, logits, -jnp.inf)


def _order(x: Float[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """Unsigned integers in the order of `x`."""
    bits = jnp.finfo(x.dtype).bits
    code = jax.lax.bitcast_convert_type(x + 0, jnp.dtype(f"uint{bits}"))  # no negative zero
    sign = jnp.asarray(1 << (bits - 1), code.dtype)
    return jnp.where(code >= sign, ~code, code | sign)


def keep_min_p(logits: Float[Array, " vocab"], min_p: Number) -> Float[Array, " vocab"]:
    """The logits with -inf for all tokens less than `min_p` times as likely as the likeliest."""
    least = logits.max() + jnp.log(jnp.asarray(min_p, logits.dtype))
    return jnp.where(logits >= least, logits, -jnp.inf)
