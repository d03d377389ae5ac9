"""Log-probabilities straight from hidden states and the unembedding, never holding all logits.

The logits of a chunk of tokens exist at a time, in the forward pass and, computed once more, in
the backward pass.
"""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .axis import vary_alike, varying_axes
from .log_probs import at_least_float32
from .strided import merge, split

# Logits held at once where the caller does not choose: 64 MiB in float32.
LOGITS_AT_ONCE = 2**24


class Unembedding(eqx.Module):
    """All that turns a hidden state into logits."""

    weight: Float[Array, "vocab width"]
    bias: Float[Array, " vocab"] | None
    softcap: float | int | None = eqx.field(static=True)

    def logits(self, hidden: Float[Array, "chunk width"]) -> Float[Array, "chunk vocab"]:
        """In float32 or wider, accumulated there too."""
        wide = at_least_float32(hidden.dtype)
        logits = jnp.einsum(
            "tw,vw->tv", hidden, self.weight.astype(hidden.dtype), preferred_element_type=wide
        )
        logits = logits if self.bias is None else logits + self.bias.astype(wide)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


def linear_token_log_probs(
    hidden: Float[Array | np.ndarray, "*batch length width"],
    unembedding: Float[Array | np.ndarray, "vocab width"],
    targets: Int[Array | np.ndarray, "*batch length"],
    *,
    bias: Float[Array | np.ndarray, " vocab"] | None = None,
    softcap: float | int | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*batch length"]:
    r"""`token_log_probs` of the logits that `hidden` and `unembedding` imply, without the logits.

    $\text{logits}_t = c \tanh((U h_t + b) / c)$ for a soft cap $c$, $U h_t + b$ without one; at
    most `chunk_size x vocab` of them are held at once, in the backward pass too.

    **Arguments:**

    - `hidden`: the last hidden states; `hidden[..., t, :]` predicts `targets[..., t]`. Shape
        `(*batch, length, width)`.
    - `unembedding`: $U$. Shape `(vocab, width)`.
    - `targets`: token ids. Shape `(*batch, length)`.
    - `bias`: $b$. Shape `(vocab,)`.
    - `softcap`: $c$, a positive number.
    - `chunk_size`: how many tokens' logits to hold at once, by default as many as make 64 MiB.
    - `axis_name`: a mapped axis over which the vocabulary is sharded: `unembedding` and `bias`
        are then this device's rows, in the order of the axis, and `targets` count over all.
        Gradients are right when taken inside the mapped function, and from outside through a
        `shard_map` with `check_vma=True`; from outside through `check_vma=False` is unsupported.

    **Returns:**

    In nats, float32 or wider. Shape `(*batch, length)`. NaN where the target is not in
    `[0, vocab)`, or where the hidden state or all of its logits are not finite; the gradient from
    there is zero, so that `sequence_log_probs` can mask it out.
    """
    _check_shapes(hidden, unembedding, targets, softcap, chunk_size)
    hidden, targets = jnp.asarray(hidden), jnp.asarray(targets)
    head = Unembedding(
        jnp.asarray(unembedding), None if bias is None else jnp.asarray(bias), softcap
    )
    # A hidden state of NaN would reach the unembedding's gradient as 0 * NaN.
    finite = jnp.isfinite(jax.lax.stop_gradient(hidden)).all(axis=-1)
    hidden = jnp.where(finite[..., None], hidden, 0)
    count = _chunk_count(targets.size, unembedding.shape[0], chunk_size)
    chunks = _chunks(hidden.reshape(-1, hidden.shape[-1]), count), _chunks(targets.ravel(), count)
    log_probs = merge(_log_probs(axis_name, *vary_alike(head, *chunks)))
    return jnp.where(finite, log_probs[: finite.size].reshape(finite.shape), jnp.nan)


def linear_collisions(
    hidden: Float[Array, "*batch length width"],
    unembedding: Float[Array, "vocab width"],
    *,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | int | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "*batch length"]:
    r"""$\log\sum_v p_{t, v}^2$, for WPO's confidence, in the chunks of `linear_token_log_probs`.

    Arguments as there; no gradient flows through it.
    """
    hidden, unembedding, bias = jax.lax.stop_gradient((hidden, unembedding, bias))
    head = Unembedding(unembedding, bias, softcap)
    rows = hidden.reshape(-1, hidden.shape[-1])
    count = _chunk_count(len(rows), unembedding.shape[0], chunk_size)
    chunks = jax.lax.map(lambda chunk: collisions_of(head.logits(chunk)), _chunks(rows, count))
    return merge(chunks)[: len(rows)].reshape(hidden.shape[:-1])


def collisions_of(logits: Float[Array, "*batch vocab"]) -> Float[Array, "*batch"]:
    r"""$\log\sum_v p_v^2$, the log-probability that two samples of one distribution agree."""
    logits = logits.astype(at_least_float32(logits.dtype))
    return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1)


def _check_shapes(hidden, unembedding, targets, softcap, chunk_size) -> None:
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            "`hidden` must have shape `(*batch, length, width)` and `targets` `(*batch, length)`; "
            f"got {hidden.shape} and {targets.shape}."
        )
    if unembedding.ndim != 2 or unembedding.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"`unembedding` must have shape `(vocab, width)` with the width of `hidden`, "
            f"{hidden.shape[-1]}; got {unembedding.shape}."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"`softcap` must be a positive number or None, got {softcap}.")
    if chunk_size is not None and not chunk_size > 0:
        raise ValueError(f"`chunk_size` must be positive or None, got {chunk_size}.")


def _chunk_count(tokens: int, vocab: int, chunk_size: int | None) -> int:
    chunk_size = chunk_size or max(1, LOGITS_AT_ONCE // vocab)
    return max(1, -(-tokens // chunk_size))


def _chunks(x: Array, count: int) -> Array:
    """`(tokens, ...)` to `(count, chunk, ...)`, padded with zeros."""
    padding = [(0, -len(x) % count)] + [(0, 0)] * (x.ndim - 1)
    return split(jnp.pad(x, padding), count)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(
    axis_name: str | None,
    head: Unembedding,
    hidden: Float[Array, "count chunk width"],
    targets: Int[Array, "count chunk"],
) -> Float[Array, "count chunk"]:
    return _log_probs_forward(axis_name, head, hidden, targets)[0]


def _log_probs_forward(axis_name, head, hidden, targets):
    """Log-probabilities, and of each token only the normaliser as a residual."""

    def chunk(operands):
        hidden, targets = operands
        logits = head.logits(hidden)
        peak = _over(jax.lax.pmax, jax.lax.stop_gradient(logits).max(axis=-1), axis_name)
        peak = jnp.where(jnp.isfinite(peak), peak, jnp.nan)
        total = _over(jax.lax.psum, jnp.exp(logits - peak[:, None]).sum(axis=-1), axis_name)
        is_target = _is_target(targets, logits.shape[-1], axis_name)
        # NaN where no device has the target: it is outside the vocabulary.
        found = _over(jax.lax.psum, is_target.sum(axis=-1), axis_name) == 1
        picked = _over(jax.lax.psum, jnp.where(is_target, logits, 0).sum(axis=-1), axis_name)
        normaliser = peak + jnp.log(total)
        return jnp.where(found, picked - normaliser, jnp.nan), normaliser

    log_probs, normalisers = jax.lax.map(chunk, (hidden, targets))
    return log_probs, (head, hidden, targets, normalisers)


def _log_probs_backward(axis_name, residuals, cotangents):
    """Each chunk's logits once more; the cotangent of a logit is `(is target) - p`."""
    head, hidden, targets, normalisers = residuals

    def chunk(head_gradient, operands):
        hidden, targets, normaliser, cotangent = operands
        logits, pull = jax.vjp(lambda head, hidden: head.logits(hidden), head, hidden)
        # A cotangent of 0 means 0 whatever the logits: padding and masked tokens end here.
        probs = jnp.exp(logits - normaliser[:, None])
        is_target = _is_target(targets, logits.shape[-1], axis_name)
        slope = jnp.where(is_target, 1 - probs, -probs)
        live = (cotangent != 0) & jnp.isfinite(normaliser)
        in_head, in_hidden = pull(jnp.where(live[:, None], slope * cotangent[:, None], 0))
        return jax.tree.map(jnp.add, head_gradient, in_head), in_hidden

    head_gradient, hidden_gradient = jax.lax.scan(
        chunk, jax.tree.map(jnp.zeros_like, head), (hidden, targets, normalisers, cotangents)
    )
    if axis_name is not None and axis_name not in varying_axes(hidden):
        # Each device has seen its own part of the vocabulary. Where `shard_map` tracks what
        # varies, the transpose of the cast in `vary_alike` has this sum; elsewhere it is ours.
        hidden_gradient = jax.lax.psum(hidden_gradient, axis_name)
    return head_gradient, hidden_gradient, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _over(reduce: Callable, x: Array, axis_name: str | None) -> Array:
    return x if axis_name is None else reduce(x, axis_name)


def _is_target(targets: Int[Array, " chunk"], vocab: int, axis_name: str | None) -> Array:
    """`(chunk, vocab)`: by comparison, not by a gather, so that vocabulary shards stay local."""
    ids = jnp.arange(vocab, dtype=targets.dtype)
    if axis_name is not None:
        ids += jax.lax.axis_index(axis_name).astype(targets.dtype) * vocab
    return targets[:, None] == ids
