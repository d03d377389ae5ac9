"""Chooses the next token from logits: greedy, or sampled with temperature, top-k, top-p and min-p.

`generate.py` computes the logits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

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
    if key is None:
        return jnp.argmax(logits)
    logits = logits / jnp.asarray(temperature, logits.dtype)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    return jax.random.categorical(key, logits)


def keep_top_k(logits: Float[Array, " vocab"], top_k: int) -> Float[Array, " vocab"]:
    """The logits with -inf for all but the `top_k` largest; ties with the smallest of them stay."""
    least = jax.lax.top_k(logits, min(top_k, logits.size))[0][-1]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, " vocab"], top_p: Number) -> Float[Array, " vocab"]:
    """The logits with -inf for all but the fewest tokens whose probabilities sum to `top_p`."""
    order = jnp.argsort(logits, descending=True)
    probabilities = jax.nn.softmax(logits[order])
    # The probability of all likelier tokens: 0 for the likeliest one, which therefore always stays.
    before = jnp.cumsum(probabilities) - probabilities
    is_kept = before < jnp.asarray(top_p, logits.dtype)
    ordered = jnp.where(is_kept, logits[order], -jnp.inf)
    return jnp.full_like(logits, -jnp.inf).at[order].set(ordered)


def keep_min_p(logits: Float[Array, " vocab"], min_p: Number) -> Float[Array, " vocab"]:
    """The logits with -inf for all tokens less than `min_p` times as likely as the likeliest."""
    least = logits.max() + jnp.log(jnp.asarray(min_p, logits.dtype))
    return jnp.where(logits >= least, logits, -jnp.inf)
