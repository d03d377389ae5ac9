"""The probability that two samples of a prediction are equal, from which WPO's confidence comes.

`linear.py` has the log-probabilities.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._jax.by_platform import by_platform
from .._jax.dtypes import at_least_float32
from .._jax.mapped_axes import vary_alike
from .tiles import Unembedding, fold, raised
from .tiling import tiling_for


def linear_collisions(
    hidden: Float[Array, "*batch length width"],
    unembedding: Float[Array, "vocab width"],
    *,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | int | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "*batch length"]:
    r"""$\log\sum_v p_{t, v}^2$, for WPO's confidence, in the chunks of `linear_token_log_probs`.

    The arguments are the same. No gradient flows through the result.
    """
    hidden, unembedding, bias = jax.lax.stop_gradient((hidden, unembedding, bias))
    head = Unembedding(unembedding, bias, softcap)

    def add(tile, state, hidden):
        peak, total, squares = state
        logits = tile.logits(hidden)
        peak, offset, shrunk = raised(peak, logits)
        shares = jnp.exp(logits - offset[:, None])  # (chunk, part)
        total = total * shrunk + shares.sum(axis=-1)
        return peak, total, squares * shrunk**2 + (shares**2).sum(axis=-1)

    def compute(tiling, head, hidden):
        chunks = tiling.chunks(hidden)
        zeros = jnp.zeros(chunks.shape[:2], at_least_float32(hidden.dtype))
        start = vary_alike((zeros - jnp.inf, zeros, zeros), hidden)[0]
        _, total, squares = fold(add, start, head, tiling.parts, (chunks,))
        return tiling.tokens(jnp.log(squares) - 2 * jnp.log(total))

    plan_for = tiling_for(hidden.shape[:-1], chunk_size, unembedding.shape[0])
    return by_platform(plan_for, compute, *vary_alike(head, hidden))


def collisions_of(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    r"""$\log\sum_v p_v^2$, the log-probability that two samples of one distribution are equal."""
    logits = logits.astype(at_least_float32(logits.dtype))
    return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)
