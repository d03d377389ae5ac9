r"""The KL divergence of two next-token distributions over the whole vocabulary, token by token.

From logits, or straight from hidden states and unembeddings, a chunk of tokens at a time; whose
they are, and what is summed, is in `_diagnosis/compare.py`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._jax.dtypes import at_least_float32
from .._jax.explicit_meshes import automatic
from .._jax.linear_map import per_tile, share, sum_parts, with_transpose
from .._jax.mapped_axes import vary_alike
from .._jax.microbatches import merge
from .tiles import Unembedding, check_chunk_size, check_head, chunked

# Logits of each side held at once where the caller does not choose: 32 MiB in float32.
_LOGITS_AT_ONCE = 2**23


def token_kl(
    logits: Float[Array | np.ndarray, "*batch vocab"],
    reference_logits: Float[Array | np.ndarray, "*batch vocab"],
) -> Float[Array, "*batch"]:
    r"""$\sum_v p_v (\log p_v - \log q_v)$ of the distributions $p$ and $q$ of two rows of logits.

    **Arguments:**

    - `logits`, `reference_logits`: of $p$ and of $q$. Shape `(*batch, vocab)`.

    **Returns:**

    In nats, float32 or wider, not negative but for rounding. Shape `(*batch,)`. Infinite where
    $q$ is 0 and $p$ is not; a token that both exclude adds nothing.
    """
    log_p, log_q = (
        jax.nn.log_softmax(jnp.asarray(x).astype(at_least_float32(x.dtype)), axis=-1)
        for x in (logits, reference_logits)
    )
    return (jnp.exp(log_p) * _difference(log_p, log_q)).sum(axis=-1)


@automatic
def linear_kl(
    hidden: Float[Array | np.ndarray, "*batch width"],
    unembedding: Float[Array | np.ndarray, "vocab width"],
    reference_hidden: Float[Array | np.ndarray, "*batch reference_width"],
    reference_unembedding: Float[Array | np.ndarray, "vocab reference_width"],
    *,
    bias: Float[Array | np.ndarray, " vocab"] | None = None,
    softcap: float | int | None = None,
    reference_bias: Float[Array | np.ndarray, " vocab"] | None = None,
    reference_softcap: float | int | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*batch"]:
    r"""`token_kl` of the logits that two hidden states and two unembeddings imply, without them.

    At most `chunk_size x vocab` logits of each of the two are held at once, in the backward pass
    too. The gradient flows into both sides; stop it where the reference is fixed.

    **Arguments:**

    - `hidden`, `reference_hidden`: the last hidden states, whose widths may differ. Shape
        `(*batch, width)`.
    - `unembedding`, `reference_unembedding`: of one vocabulary. Shape `(vocab, width)`.
    - `bias`, `softcap`, `reference_bias`, `reference_softcap`: as in `linear_token_log_probs`.
    - `chunk_size`: how many tokens' logits to hold at once, by default as many as make 64 MiB.
    - `axis_name`: a mapped axis over which both vocabularies are sharded alike; where gradients
        may be taken is said at `linear_token_log_probs`.

    **Returns:**

    $\mathrm{KL}(p \,\|\, q)$ in nats, float32 or wider. Shape `(*batch,)`. NaN where a hidden state
    or all of its logits are not finite; the gradient from there is zero, so that a mask can
    remove it.

    **Raises:**

    `ValueError` at trace time where shapes do not fit or a number is out of range.
    """
    check_head(hidden, unembedding, softcap)
    check_head(reference_hidden, reference_unembedding, reference_softcap, "reference_")
    _check_together(hidden, unembedding, reference_hidden, reference_unembedding, chunk_size)
    heads = (
        Unembedding.of(unembedding, bias, softcap),
        Unembedding.of(reference_unembedding, reference_bias, reference_softcap),
    )
    rows = [jnp.asarray(x) for x in (hidden, reference_hidden)]
    # A hidden state of NaN would reach the unembedding's gradient as 0 * NaN.
    finite = [jnp.isfinite(jax.lax.stop_gradient(x)).all(axis=-1) for x in rows]
    both = finite[0] & finite[1]
    rows = [jnp.where(both[..., None], x, 0) for x in rows]
    chunk_size = chunk_size or max(1, _LOGITS_AT_ONCE // len(unembedding))
    chunks = tuple(chunked(x, both.ndim, chunk_size) for x in rows)
    kl = merge(_kl(axis_name, *vary_alike(heads, chunks))[0])
    return jnp.where(both, kl[: both.size].reshape(both.shape), jnp.nan)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _kl(axis_name, heads, hiddens):
    """The divergences and, of each token, the two normalisers: all that the derivatives need."""

    def chunk(hiddens):
        logits = _both(heads, hiddens)
        normalisers = tuple(_normaliser(x, axis_name) for x in logits)
        p, difference = _compared(logits, normalisers)
        return _over(jax.lax.psum, (p * difference).sum(axis=-1), axis_name), normalisers

    return jax.lax.map(chunk, hiddens)


@_kl.defjvp
def _kl_jvp(axis_name, primals, tangents):
    heads, hiddens = primals
    kl, normalisers = results = _kl(axis_name, heads, hiddens)
    # Where the divergence is not finite its gradient is 0, whatever the logits.
    live = jnp.isfinite(kl)
    kept = [jnp.where(live, x, 0) for x in (kl, *normalisers)]
    rows = hiddens, live, *kept
    in_heads, in_hiddens = tangents
    operands = vary_alike((in_heads, share(in_hiddens, axis_name, hiddens[0])), primals)[0]
    pushed = with_transpose(
        partial(_push, heads, rows), partial(_pull, heads, rows), operands, results
    )
    return results, sum_parts(pushed, axis_name, hiddens[0])


def _push(heads, rows, tangents):
    """What tangents of the heads and the hidden states are in the divergences and normalisers."""
    in_heads, in_hiddens = tangents

    @per_tile
    def chunk(operands):
        in_hiddens, hiddens, live, kl, *normalisers = operands
        logits, in_logits = jax.jvp(_both, (heads, hiddens), (in_heads, in_hiddens))
        p, q, slope = _slopes(logits, live, kl, normalisers)
        of_p, of_q = (jnp.where(live[:, None], x, 0) for x in in_logits)
        in_kl = (slope * of_p + (q - p) * of_q).sum(axis=-1)
        return in_kl, ((p * of_p).sum(axis=-1), (q * of_q).sum(axis=-1))

    return jax.lax.map(chunk, (in_hiddens, *rows))


def _pull(heads, rows, cotangents):
    """The transpose of `_push`."""

    def chunk(in_heads, operands):
        (cotangent, of_normalisers), hiddens, live, kl, *normalisers = operands
        logits, pull = jax.vjp(_both, heads, hiddens)
        p, q, slope = _slopes(logits, live, kl, normalisers)
        # Both are 0 where not live, but a cotangent may be NaN there.
        of_kl, of_p, of_q = (jnp.where(live, x, 0)[:, None] for x in (cotangent, *of_normalisers))
        more, in_hiddens = pull([slope * of_kl + p * of_p, (q - p) * of_kl + q * of_q])
        return jax.tree.map(jnp.add, in_heads, more), in_hiddens

    zeros = vary_alike(jax.tree.map(jnp.zeros_like, heads), rows[0])[0]
    return jax.lax.scan(chunk, zeros, (cotangents, *rows))


def _both(heads, hiddens):
    return [head.logits(hidden) for head, hidden in zip(heads, hiddens, strict=True)]


def _slopes(logits, live, kl, normalisers):
    r"""$p$, $q$, and the slope of KL in a logit of $p$, $p_v (\log p_v - \log q_v - KL)$.

    In a logit of $q$ it is $q_v - p_v$.
    """
    logits = [jnp.where(live[:, None], x, 0) for x in logits]
    p, difference = _compared(logits, normalisers)
    return p, jnp.exp(logits[1] - normalisers[1][:, None]), p * (difference - kl[:, None])


def _normaliser(
    logits: Float[Array, "chunk vocab"], axis_name: str | None
) -> Float[Array, " chunk"]:
    peak = _over(jax.lax.pmax, jax.lax.stop_gradient(logits).max(axis=-1), axis_name)
    peak = jnp.where(jnp.isfinite(peak), peak, jnp.nan)
    return peak + jnp.log(
        _over(jax.lax.psum, jnp.exp(logits - peak[:, None]).sum(axis=-1), axis_name)
    )


def _compared(logits, normalisers):
    r"""$p$ and $\log p - \log q$, which is 0 where $p$ is."""
    log_p, log_q = (x - n[:, None] for x, n in zip(logits, normalisers, strict=True))
    return jnp.exp(log_p), _difference(log_p, log_q)


def _difference(log_p: Float[Array, "*shape"], log_q: Float[Array, "*shape"]):
    """`log_p - log_q`, and 0 where p is 0, since 0 * inf is NaN; a NaN of p stays one."""
    impossible = log_p == -jnp.inf
    return jnp.where(impossible, 0, log_p) - jnp.where(impossible, 0, log_q)


def _over(reduce: Callable, x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else reduce(x, axis_name)


def _check_together(hidden, unembedding, reference_hidden, reference_unembedding, chunk_size):
    if hidden.shape[:-1] != reference_hidden.shape[:-1]:
        raise ValueError(
            "`hidden` and `reference_hidden` must be of the same tokens, `(*batch, width)`; got "
            f"{hidden.shape} and {reference_hidden.shape}."
        )
    if unembedding.shape[0] != reference_unembedding.shape[0]:
        raise ValueError(
            "`unembedding` and `reference_unembedding` must have one vocabulary; got "
            f"{unembedding.shape[0]} and {reference_unembedding.shape[0]} tokens. Compare models "
            "that share a tokenizer."
        )
    check_chunk_size(chunk_size)
