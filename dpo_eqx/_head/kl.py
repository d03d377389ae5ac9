r"""The KL divergence of two next-token distributions over the whole vocabulary, token by token.

It comes from logits, or from hidden states and unembeddings in the tiles of `tiles.py`.
`_diagnosis/compare.py` applies it to a policy and its reference.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._jax.by_platform import by_platform
from .._jax.dtypes import at_least_float32
from .._jax.explicit_meshes import automatic
from .._jax.linear_map import per_tile, share, sum_parts, with_transpose
from .._jax.mapped_axes import vary_alike
from .tiles import (
    Tile,
    Unembedding,
    check_chunk_size,
    check_head,
    fold,
    over_devices,
    part_at,
    put_back,
    raised,
    tile_at,
)
from .tiling import Tiling, tiling_for

Heads = tuple[Unembedding, Unembedding]
Hiddens = tuple[Float[Array, "*batch width"], Float[Array, "*batch reference_width"]]
Normalisers = tuple[Float[Array, "*batch"], Float[Array, "*batch"]]


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

    The logits of `chunk_size` tokens for a part of the vocabulary are held at once, of both sides,
    in the backward pass too. The gradient flows into both sides; stop it if the reference is fixed.

    **Arguments:**

    - `hidden`, `reference_hidden`: the last hidden states, whose widths may differ. Shape
        `(*batch, width)`.
    - `unembedding`, `reference_unembedding`: of one vocabulary. Shape `(vocab, width)`.
    - `bias`, `softcap`, `reference_bias`, `reference_softcap`: as in `linear_token_log_probs`.
    - `chunk_size`: as in `linear_token_log_probs`.
    - `axis_name`: a mapped axis over which both vocabularies are sharded alike. Gradients may be
        taken as for `linear_token_log_probs`.

    **Returns:**

    $\mathrm{KL}(p \,\|\, q)$ in nats, float32 or wider. Shape `(*batch,)`. NaN where a hidden state
    or all of its logits are not finite; the gradient from there is zero, so that a mask can
    remove it.

    **Raises:**

    `ValueError` at trace time if shapes do not fit or a number is out of range.
    """
    check_head(hidden, unembedding, softcap)
    check_head(reference_hidden, reference_unembedding, reference_softcap, "reference_")
    _check_together(hidden, unembedding, reference_hidden, reference_unembedding, chunk_size)
    heads = (
        Unembedding.of(unembedding, bias, softcap),
        Unembedding.of(reference_unembedding, reference_bias, reference_softcap),
    )
    hiddens = [jnp.asarray(x) for x in (hidden, reference_hidden)]
    # A hidden state of NaN would reach the unembedding's gradient as 0 * NaN.
    finite = [jnp.isfinite(jax.lax.stop_gradient(x)).all(axis=-1) for x in hiddens]
    both = finite[0] & finite[1]
    hiddens = [jnp.where(both[..., None], x, 0) for x in hiddens]
    kl = _kl(axis_name, chunk_size, *vary_alike(heads, tuple(hiddens)))[0]
    return jnp.where(both, kl, jnp.nan)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _kl(
    axis_name: str | None, chunk_size: int | None, heads: Heads, hiddens: Hiddens
) -> tuple[Float[Array, "*batch"], Normalisers]:
    r"""The divergences and the two normalisers of each token: all that the derivatives need.

    With logits $a$ of $p$ and $b$ of $q$, and normalisers $A$ and $B$, the divergence is
    $\sum_v p_v (a_v - b_v) - (A - B)$. The sum is accumulated as the normalisers are, by an online
    softmax.
    """
    plan_for = _tiling_for(chunk_size, heads, hiddens)
    return by_platform(plan_for, partial(_fold_kl, axis_name), heads, hiddens)


def _tiling_for(chunk_size: int | None, heads: Heads, hiddens: Hiddens) -> Callable[[str], Tiling]:
    return tiling_for(hiddens[0].shape[:-1], chunk_size, heads[0].weight.shape[0])


def _fold_kl(
    axis_name: str | None, tiling: Tiling, heads: Heads, hiddens: Hiddens
) -> tuple[Float[Array, "*batch"], Normalisers]:
    hiddens = tiling.chunks(hiddens)
    wide = jnp.result_type(*(at_least_float32(x.dtype) for x in hiddens))
    zeros = jnp.zeros(hiddens[0].shape[:2], wide)
    side = zeros - jnp.inf, zeros
    start = vary_alike((side, side, zeros, zeros > 0), hiddens[0])[0]

    def add(tiles, state, *hiddens):
        (peak_p, total_p), (peak_q, total_q), moment, is_infinite = state
        p, q = (tile.logits(hidden) for tile, hidden in zip(tiles, hiddens, strict=True))
        peak_p, offset, shrunk = raised(peak_p, p)
        shares = jnp.exp(p - offset[:, None])
        # Here q is 0 and p is not. A product with a share would lose that if the share underflows.
        excluded = (q == -jnp.inf) & (p != -jnp.inf)
        difference = jnp.where(excluded, 0, _difference(p, q))
        moment = moment * shrunk + (shares * difference).sum(axis=-1)
        total_p = total_p * shrunk + shares.sum(axis=-1)
        peak_q, offset, shrunk = raised(peak_q, q)
        total_q = total_q * shrunk + jnp.exp(q - offset[:, None]).sum(axis=-1)
        is_infinite = is_infinite | excluded.any(axis=-1)
        return (peak_p, total_p), (peak_q, total_q), moment, is_infinite

    of_p, of_q, moment, is_infinite = fold(add, start, heads, tiling.parts, hiddens, axis_name)
    peak_p, (total_p, moment) = over_devices(of_p[0], (of_p[1], moment), axis_name)
    peak_q, (total_q,) = over_devices(of_q[0], (of_q[1],), axis_name)
    if axis_name is not None:
        is_infinite = jax.lax.psum(is_infinite.astype(jnp.int32), axis_name) > 0
    log_p, log_q = jnp.log(total_p), jnp.log(total_q)
    # The peaks nearly cancel, and exactly if the two sides are the same.
    kl = moment / total_p - ((peak_p - peak_q) + (log_p - log_q))
    kl = jnp.where(is_infinite, jnp.inf, kl)
    return tiling.tokens((kl, (peak_p + log_p, peak_q + log_q)))


@_kl.defjvp
def _kl_jvp(axis_name, chunk_size, primals, tangents):
    heads, hiddens = primals
    kl, normalisers = results = _kl(axis_name, chunk_size, heads, hiddens)
    # The gradient is 0 where the divergence is not finite, whatever the logits are.
    live = jnp.isfinite(kl)
    tokens = hiddens, live, *(jnp.where(live, x, 0) for x in (kl, *normalisers))
    in_heads, in_hiddens = tangents
    operands = vary_alike((in_heads, share(in_hiddens, axis_name, hiddens[0])), primals)[0]
    plan_for = _tiling_for(chunk_size, heads, hiddens)
    pushed = with_transpose(
        lambda moved: by_platform(plan_for, partial(_push, axis_name), heads, tokens, moved),
        lambda slopes: by_platform(plan_for, partial(_pull, axis_name), heads, tokens, slopes),
        operands,
        results,
    )
    return results, sum_parts(pushed, axis_name, hiddens[0])


def _push(axis_name: str | None, tiling: Tiling, heads: Heads, tokens: Any, tangents: Any) -> Any:
    """The tangents of the divergences and the normalisers, from those of `heads` and `hiddens`."""
    in_heads, in_hiddens = tangents
    tokens, in_hiddens = tiling.chunks((tokens, in_hiddens))
    zeros = jnp.zeros_like(tokens[2])
    start = vary_alike((zeros, (zeros, zeros)), tokens[0][0])[0]

    @per_tile
    def one_part(sums, index):
        tiles = [tile_at(head, index, tiling.parts, jnp.int32, axis_name) for head in heads]
        in_tiles = [part_at(in_head, index, tiling.parts) for in_head in in_heads]

        @per_tile
        def chunk(operands):
            sums, in_hiddens, hiddens, live, kl, *normalisers = operands
            logits, in_logits = jax.jvp(
                partial(_logits_of, tiles),
                ([tile.head for tile in tiles], list(hiddens)),
                (in_tiles, list(in_hiddens)),
            )
            p, q, slope = _slopes(logits, live, kl, normalisers)
            of_p, of_q = (jnp.where(live[:, None], x, 0) for x in in_logits)
            in_kl = (slope * of_p + (q - p) * of_q).sum(axis=-1)
            moved = in_kl, ((p * of_p).sum(axis=-1), (q * of_q).sum(axis=-1))
            return jax.tree.map(jnp.add, sums, moved)

        return jax.lax.map(chunk, (sums, in_hiddens, *tokens)), None

    return tiling.tokens(jax.lax.scan(one_part, start, jnp.arange(tiling.parts))[0])


def _pull(axis_name: str | None, tiling: Tiling, heads: Heads, tokens: Any, cotangents: Any) -> Any:
    """The transpose of `_push`."""
    tokens, cotangents = tiling.chunks((tokens, cotangents))
    hiddens, live, kl, *_ = tokens
    # At a token that is not live, a cotangent may be NaN.
    cotangents = jax.tree.map(lambda x: jnp.where(live, x, 0), cotangents)
    wide = kl.dtype

    def one_part(sums, index):
        in_heads, in_hiddens = sums
        tiles = [tile_at(head, index, tiling.parts, jnp.int32, axis_name) for head in heads]

        def chunk(in_tiles, operands):
            in_hiddens, (of_kl, (of_p, of_q)), hiddens, live, kl, *normalisers = operands
            of_kl, of_p, of_q = (x[:, None] for x in (of_kl, of_p, of_q))
            logits = _logits_of(tiles, [tile.head for tile in tiles], hiddens)
            p, q, slope = _slopes(logits, live, kl, normalisers)
            slopes = slope * of_kl + p * of_p, (q - p) * of_kl + q * of_q
            sides = zip(tiles, hiddens, logits, slopes, strict=True)
            pulled = [tile.head.pull(hidden, x, slopes) for tile, hidden, x, slopes in sides]
            more_tiles, more_hiddens = zip(*pulled, strict=True)
            add = partial(jax.tree.map, jnp.add)
            return add(in_tiles, more_tiles), add(in_hiddens, more_hiddens)

        zeros = tuple(jax.tree.map(lambda x: jnp.zeros_like(x, wide), t.head) for t in tiles)
        operands = in_hiddens, cotangents, *tokens
        in_tiles, in_hiddens = jax.lax.scan(chunk, vary_alike(zeros, hiddens[0])[0], operands)
        sides = zip(in_heads, in_tiles, strict=True)
        in_heads = tuple(put_back(head, in_tile, index, tiling.parts) for head, in_tile in sides)
        return (in_heads, in_hiddens), None

    zeros = jax.tree.map(jnp.zeros_like, heads), tuple(jnp.zeros_like(x, wide) for x in hiddens)
    start = vary_alike(zeros, hiddens[0])[0]
    (in_heads, in_hiddens), _ = jax.lax.scan(one_part, start, jnp.arange(tiling.parts))
    in_hiddens = jax.tree.map(lambda x, hidden: x.astype(hidden.dtype), in_hiddens, hiddens)
    return in_heads, tiling.tokens(in_hiddens)


def _logits_of(tiles: Sequence[Tile], heads: Sequence[Unembedding], hiddens: Sequence[Array]):
    """The logits of both sides; `heads` are those of `tiles`, apart to be differentiated."""
    return [
        tile._replace(head=head).logits(hidden)
        for tile, head, hidden in zip(tiles, heads, hiddens, strict=True)
    ]


def _slopes(logits, live, kl, normalisers):
    r"""$p$, $q$, and the slope of KL in a logit of $p$, $p_v (\log p_v - \log q_v - KL)$.

    In a logit of $q$ it is $q_v - p_v$.
    """
    logits = [jnp.where(live[:, None], x, -jnp.inf) for x in logits]
    log_p, log_q = (x - n[:, None] for x, n in zip(logits, normalisers, strict=True))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return p, q, p * (_difference(log_p, log_q) - kl[:, None])


def _difference(log_p: Float[Array, "*shape"], log_q: Float[Array, "*shape"]):
    """`log_p - log_q`, and 0 where p is 0, since 0 * inf is NaN; a NaN of p stays one."""
    impossible = log_p == -jnp.inf
    return jnp.where(impossible, 0, log_p) - jnp.where(impossible, 0, log_q)


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
