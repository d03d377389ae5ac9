"""Log-probabilities straight from hidden states and the unembedding, never holding all logits.

The logits of some tokens for a part of the vocabulary exist at a time, in the forward pass and,
computed once more, in the backward pass.
"""

from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .axis import vary_alike, varying_axes
from .log_probs import at_least_float32
from .strided import merge, nearest_divisor, split

# Logits held at once. A CPU is fastest where they stay in its cache, in 8 MiB of float32; an
# accelerator where a product is large enough to fill it, here 256 MiB.
LOGITS_AT_ONCE = {"cpu": 2**21}
LOGITS_AT_ONCE_ELSEWHERE = 2**26
# Tokens at once where the caller does not choose. With more, the part of the vocabulary that
# goes with them gets thin.
TOKENS_AT_ONCE = 4096


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

    def pull(
        self,
        hidden: Float[Array, "chunk width"],
        logits: Float[Array, "chunk vocab"],
        slopes: Float[Array, "chunk vocab"],
    ) -> tuple["Unembedding", Float[Array, "chunk width"]]:
        """What slopes in the logits are in `self` and in `hidden`, in float32 or wider."""
        wide = logits.dtype
        if self.softcap is not None:
            slopes = slopes * (1 - (logits / self.softcap) ** 2)
        narrow, weight = slopes.astype(hidden.dtype), self.weight.astype(hidden.dtype)
        in_hidden = jnp.einsum("tv,vw->tw", narrow, weight, preferred_element_type=wide)
        in_weight = jnp.einsum("tv,tw->vw", narrow, hidden, preferred_element_type=wide)
        in_bias = None if self.bias is None else slopes.sum(axis=0)
        return Unembedding(in_weight, in_bias, self.softcap), in_hidden


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

    $\text{logits}_t = c \tanh((U h_t + b) / c)$ for a soft cap $c$, $U h_t + b$ without one. Those
    of `chunk_size` tokens for a part of the vocabulary are held at once, in the backward pass too.

    **Arguments:**

    - `hidden`: the last hidden states; `hidden[..., t, :]` predicts `targets[..., t]`. Shape
        `(*batch, length, width)`.
    - `unembedding`: $U$. Shape `(vocab, width)`.
    - `targets`: token ids. Shape `(*batch, length)`.
    - `bias`: $b$. Shape `(vocab,)`.
    - `softcap`: $c$, a positive number.
    - `chunk_size`: of how many tokens at most, by default 4096. The parts of the vocabulary are
        then as large as speed asks for: some 8 MiB of logits on a CPU, 256 MiB elsewhere.
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
    rows, parts = _rows(chunk_size, unembedding.shape[0], hidden, targets)
    log_probs = merge(_log_probs(axis_name, parts, *vary_alike(head, *rows)))
    vocab = unembedding.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    known = finite & (targets >= 0) & (targets < vocab)
    return jnp.where(known, log_probs[: known.size].reshape(known.shape), jnp.nan)


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
    (hidden_rows,), parts = _rows(chunk_size, unembedding.shape[0], hidden)
    zeros = jnp.zeros(hidden_rows.shape[:2], at_least_float32(hidden.dtype))

    def add(tile, state, hidden):
        peak, total, squares = state
        logits = tile.head.logits(hidden)
        peak, offset, shrunk = _raised(peak, logits)
        shares = jnp.exp(logits - offset[:, None])
        total = total * shrunk + shares.sum(axis=-1)
        return peak, total, squares * shrunk**2 + (shares**2).sum(axis=-1)

    start, head, rows = vary_alike((zeros - jnp.inf, zeros, zeros), head, (hidden_rows,))
    _, total, squares = _fold(add, start, head, parts, rows)
    collisions = merge(jnp.log(squares) - 2 * jnp.log(total))
    return collisions[: hidden[..., 0].size].reshape(hidden.shape[:-1])


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


class _Tile(NamedTuple):
    """A part of the vocabulary: its rows of the unembedding, and which tokens they are."""

    head: Unembedding
    ids: Int[Array, " part"]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _log_probs(
    axis_name: str | None,
    parts: int,
    head: Unembedding,
    hidden: Float[Array, "count chunk width"],
    targets: Int[Array, "count chunk"],
) -> Float[Array, "count chunk"]:
    return _log_probs_forward(axis_name, parts, head, hidden, targets)[0]


def _log_probs_forward(axis_name, parts, head, hidden, targets):
    """Log-probabilities, and of each token only the normaliser as a residual."""
    zeros = jnp.zeros(targets.shape, at_least_float32(hidden.dtype))
    start = vary_alike((zeros - jnp.inf, zeros, zeros), hidden)[0]

    def add(tile, state, hidden, targets):
        peak, total, picked = state
        logits = tile.head.logits(hidden)
        peak, offset, shrunk = _raised(peak, logits)
        total = total * shrunk + jnp.exp(logits - offset[:, None]).sum(axis=-1)
        # By comparison, not by a gather, so that vocabulary shards stay local.
        is_target = targets[:, None] == tile.ids
        return peak, total, picked + jnp.where(is_target, logits, 0).sum(axis=-1)

    state = _fold(add, start, head, parts, (hidden, targets), axis_name)
    peak, total, picked = _over_devices(state, axis_name)
    normaliser = jnp.where(jnp.isfinite(peak), peak, jnp.nan) + jnp.log(total)
    return picked - normaliser, (head, hidden, targets, normaliser)


def _log_probs_backward(axis_name, parts, residuals, cotangents):
    """Each tile's logits once more; the slope in a logit is `(is target) - p`."""
    head, hidden, targets, normalisers = residuals
    # A cotangent of 0 means 0 whatever the logits: padding and masked tokens end here.
    live = (cotangents != 0) & jnp.isfinite(normalisers)
    rows = hidden, targets, jnp.where(live, normalisers, 0), jnp.where(live, cotangents, 0), live

    def one_part(carry, index):
        in_head, in_hidden = carry
        tile = _tile(head, index, parts, targets.dtype, axis_name)

        def chunk(in_tile, operands):
            in_hidden, hidden, targets, normaliser, cotangent, live = operands
            logits = tile.head.logits(hidden)
            probs = jnp.exp(jnp.where(live[:, None], logits, -jnp.inf) - normaliser[:, None])
            slopes = jnp.where(targets[:, None] == tile.ids, 1 - probs, -probs)
            more = tile.head.pull(hidden, logits, slopes * cotangent[:, None])
            return jax.tree.map(jnp.add, (in_tile, in_hidden), more)

        wide = jax.tree.map(lambda x: jnp.zeros_like(x, cotangents.dtype), tile.head)
        in_tile, in_hidden = jax.lax.scan(chunk, vary_alike(wide, hidden)[0], (in_hidden, *rows))
        return (_put(in_head, in_tile, index, parts), in_hidden), None

    zeros = jax.tree.map(jnp.zeros_like, head), jnp.zeros_like(hidden, cotangents.dtype)
    carry = vary_alike(zeros, hidden)[0]
    (in_head, in_hidden), _ = jax.lax.scan(one_part, carry, jnp.arange(parts))
    if axis_name is not None and axis_name not in varying_axes(hidden):
        # Each device has seen its own part of the vocabulary. Where `shard_map` tracks what
        # varies, the transpose of the cast in `vary_alike` has this sum; elsewhere it is ours.
        in_hidden = jax.lax.psum(in_hidden, axis_name)
    return in_head, in_hidden.astype(hidden.dtype), None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


def _rows(chunk_size: int | None, vocab: int, *arrays: Array) -> tuple[tuple[Array, ...], int]:
    """Arrays of tokens in chunks, `(count, chunk, ...)`, and the parts of the vocabulary.

    The first array has the width as its last axis, the others have one entry for each token.
    """
    tokens = arrays[0][..., 0].size
    most = min(tokens, chunk_size or TOKENS_AT_ONCE)
    at_once = LOGITS_AT_ONCE.get(jax.default_backend(), LOGITS_AT_ONCE_ELSEWHERE)
    parts = _parts(vocab, most * vocab / at_once)
    # Parts of a vocabulary with few divisors may be large: it is then fewer tokens.
    most = max(1, min(most, 4 * at_once * parts // vocab))
    count = max(1, -(-tokens // most))
    flat = [x.reshape(tokens, *x.shape[arrays[0].ndim - 1 :]) for x in arrays]
    rows = tuple(
        split(jnp.pad(x, [(0, -tokens % count)] + [(0, 0)] * (x.ndim - 1)), count) for x in flat
    )
    return rows, parts


def _parts(vocab: int, wanted: float) -> int:
    """About as many equal parts as wanted, each of a multiple of eight rows where `vocab` is one.

    Up to eight devices can then hold an equal share of each part.
    """
    return nearest_divisor(vocab // 8 if vocab % 8 == 0 else vocab, wanted)


def _tile(head, index, parts, dtype, axis_name) -> _Tile:
    """Every `parts`-th row from `index` on: with stride, as in `strided.py`, and for its reason."""
    vocab = head.weight.shape[0]
    first = 0 if axis_name is None else jax.lax.axis_index(axis_name).astype(dtype) * vocab
    ids = jnp.arange(0, vocab, parts, dtype=dtype) + index.astype(dtype) + first
    return _Tile(jax.tree.map(lambda x: _every(parts, x, index), head), ids)


def _every(parts, x, index):
    """Rows `index::parts`."""
    # A CPU slices bf16 by way of float32. That `x` seems to depend on the index keeps XLA from
    # widening all of it once, before the loop.
    x, index = jax.lax.optimization_barrier((x, index))
    x = x.reshape(-1, parts, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False)


def _put(head, in_tile, index, parts):
    """`head` with the rows of one tile."""

    def put(x, rows):
        split = x.reshape(-1, parts, *x.shape[1:])
        rows = rows.astype(x.dtype)
        return jax.lax.dynamic_update_index_in_dim(split, rows, index, axis=1).reshape(x.shape)

    return jax.tree.map(put, head, in_tile)


def _fold(add, state, head, parts, rows, axis_name=None):
    """`state = add(tile, state, *rows)` over all parts of the vocabulary, chunk by chunk."""
    ids = rows[-1].dtype if len(rows) > 1 else jnp.int32

    def one_part(state, index):
        tile = _tile(head, index, parts, ids, axis_name)
        return jax.lax.map(lambda operands: add(tile, *operands), (state, *rows)), None

    return jax.lax.scan(one_part, state, jnp.arange(parts))[0]


def _raised(peak, logits):
    """The greatest logit so far, a finite offset near it, and by what earlier sums shrink."""
    higher = jnp.maximum(peak, jax.lax.stop_gradient(logits).max(axis=-1))
    offset = jnp.where(jnp.isfinite(higher), higher, 0)
    return higher, offset, jnp.exp(peak - offset)


def _over_devices(state, axis_name):
    """The sums over the vocabulary of all devices, from those of each."""
    if axis_name is None:
        return state
    peak, total, *sums = state
    highest = jax.lax.pmax(jax.lax.stop_gradient(peak), axis_name)
    offset = jnp.where(jnp.isfinite(highest), highest, 0)
    return highest, *jax.lax.psum((total * jnp.exp(peak - offset), *sums), axis_name)
