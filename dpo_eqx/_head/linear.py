"""Log-probabilities from hidden states and the unembedding, without ever holding all logits.

Only one tile of logits exists at a time: some tokens by a part of the vocabulary. The backward pass
computes each tile once more. `tiles.py` chooses the tiles.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from .._arrays.tokens import as_ids
from .._jax.by_platform import by_platform
from .._jax.dtypes import at_least_float32
from .._jax.explicit_meshes import automatic
from .._jax.linear_map import moving, per_tile, share, sum_parts, with_transpose
from .._jax.mapped_axes import vary_alike
from . import statistics
from .statistics import TokenStatistics
from .tiles import (
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


@automatic
def linear_token_log_probs(
    hidden: Float[Array | np.ndarray, "*batch length width"],
    unembedding: Float[Array | np.ndarray, "vocab width"],
    targets: Integer[Array | np.ndarray, "*batch length"],
    *,
    bias: Float[Array | np.ndarray, " vocab"] | None = None,
    softcap: float | int | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*batch length"]:
    r"""`token_log_probs` of the logits that `hidden` and `unembedding` imply, without the logits.

    $\text{logits}_t = c \tanh((U h_t + b) / c)$ for a soft cap $c$, $U h_t + b$ without one. Only
    the logits of `chunk_size` tokens for a part of the vocabulary are held at once, in the backward
    pass, too.

    **Arguments:**

    - `hidden`: the last hidden states; `hidden[..., t, :]` predicts `targets[..., t]`. Shape
        `(*batch, length, width)`.
    - `unembedding`: $U$. Shape `(vocab, width)`.
    - `targets`: token ids. Shape `(*batch, length)`.
    - `bias`: $b$. Shape `(vocab,)`.
    - `softcap`: $c$, a positive number.
    - `chunk_size`: the largest number of tokens whose logits are held at once, by default 4096. The
        part of the vocabulary is then chosen for speed: about 8 MiB of logits on a CPU, 256 MiB on
        other devices.
    - `axis_name`: a mapped axis over which the vocabulary is sharded. `unembedding` and `bias` are
        then this device's rows, in the order of the axis, and `targets` index the whole
        vocabulary. Gradients are correct if taken inside the mapped function, or from outside
        through a `shard_map` with `check_vma=True`. From outside through `check_vma=False` they
        are not supported.

    **Returns:**

    In nats, float32 or wider. Shape `(*batch, length)`. A value is NaN if its target is not in
    `[0, vocab)`, or if the hidden state or all of its logits are not finite. The gradient of such a
    token is zero, so that `sequence_log_probs` can mask it out.
    """
    _check_shapes(hidden, unembedding, targets, softcap, chunk_size)
    head = Unembedding.of(unembedding, bias, softcap)
    return with_statistics(hidden, head, targets, (), chunk_size, axis_name)[0]


@automatic
def with_statistics(
    hidden: Float[Array | np.ndarray, "*batch length width"],
    head: Unembedding,
    targets: Integer[Array | np.ndarray, "*batch length"],
    wanted: tuple[str, ...],
    chunk_size: int | None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "*batch length"], TokenStatistics]:
    """`linear_token_log_probs`, and the statistics with the names `wanted`, from one pass.

    Statistics do not support `axis_name`.
    """
    hidden, targets = jnp.asarray(hidden), as_ids(targets)
    # A NaN in a hidden state would reach the unembedding's gradient as 0 * NaN.
    finite = jnp.isfinite(jax.lax.stop_gradient(hidden)).all(axis=-1)
    hidden = jnp.where(finite[..., None], hidden, 0)
    operands = vary_alike(head, hidden, targets)
    log_probs, _, statistics = _log_probs(axis_name, chunk_size, wanted, *operands)
    vocab = head.weight.shape[0] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    known = finite & (targets >= 0) & (targets < vocab)
    return jnp.where(known, log_probs, jnp.nan), jax.lax.stop_gradient(statistics)


def _check_shapes(
    hidden: Array | np.ndarray,
    unembedding: Array | np.ndarray,
    targets: Array | np.ndarray,
    softcap: float | int | None,
    chunk_size: int | None,
) -> None:
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            "`hidden` must have shape `(*batch, length, width)` and `targets` `(*batch, length)`; "
            f"got {hidden.shape} and {targets.shape}."
        )
    check_head(hidden, unembedding, softcap)
    check_chunk_size(chunk_size)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _log_probs(
    axis_name: str | None,
    chunk_size: int | None,
    wanted: tuple[str, ...],
    head: Unembedding,
    hidden: Float[Array, "*batch length width"],
    targets: Int[Array, "*batch length"],
) -> tuple[Float[Array, "*batch length"], Float[Array, "*batch length"], TokenStatistics]:
    """Log-probabilities, the normaliser of each token, which the derivatives reuse, statistics."""
    plan_for = tiling_for(targets.shape, chunk_size, head.weight.shape[0])
    return by_platform(plan_for, partial(_fold_log_probs, axis_name, wanted), head, hidden, targets)


def _fold_log_probs(
    axis_name: str | None,
    wanted: tuple[str, ...],
    tiling: Tiling,
    head: Unembedding,
    hidden: Float[Array, "*batch length width"],
    targets: Int[Array, "*batch length"],
) -> tuple[Float[Array, "*batch length"], Float[Array, "*batch length"], TokenStatistics]:
    hidden, targets = tiling.chunks((hidden, targets))
    zeros = jnp.zeros(targets.shape, at_least_float32(hidden.dtype))
    sums = statistics.start(zeros, wanted)
    start = vary_alike((zeros - jnp.inf, zeros, zeros, sums), hidden)[0]

    def add(tile, state, hidden, targets):
        before, total, picked, sums = state
        logits = tile.logits(hidden)
        peak, offset, shrunk = raised(before, logits)
        sums = statistics.add(sums, logits, before, total, offset, shrunk)
        exponentials = jnp.exp(logits - offset[:, None])
        new, held = tiling.sums(exponentials, jnp.where(tile.holds(targets), logits, 0))
        return peak, total * shrunk + new, picked + held, sums

    state = fold(add, start, head, tiling.parts, (hidden, targets), axis_name)
    peak, (total,) = over_devices(state[0], (state[1],), axis_name)
    picked = state[2] if axis_name is None else jax.lax.psum(state[2], axis_name)
    vocab = head.weight.shape[0]
    measured = statistics.finished(state[3], wanted, peak, total, picked, vocab)
    total = jnp.log(total)
    # Not `picked - normaliser`: without a gradient, XLA fuses the two sums in an order of its own,
    # and a policy and a reference with the same parameters differ in the last bit.
    return tiling.tokens((picked - peak - total, peak + total, measured))


def _log_probs_jvp(
    axis_name: str | None,
    chunk_size: int | None,
    wanted: tuple[str, ...],
    primals: Any,
    tangents: Any,
) -> tuple[Any, Any]:
    """Computes each tile's logits once more, in forward and in reverse mode."""
    head, hidden, targets = primals
    *results, measured = _log_probs(axis_name, chunk_size, wanted, head, hidden, targets)
    results = tuple(results)
    # Bad tokens are found by their normaliser, not by a cotangent of 0. A good token may have a
    # cotangent of 0, too, with respect to which there are derivatives. Its logits are finite, so
    # its gradient is 0 anyway.
    live = jnp.isfinite(results[1])
    rows = hidden, targets, jnp.where(live, results[1], 0), live
    in_head, in_hidden, _ = moving(tangents)
    operands = in_head, share(in_hidden, axis_name, hidden)
    plan_for = tiling_for(targets.shape, chunk_size, head.weight.shape[0])
    pushed = with_transpose(
        lambda moved: by_platform(plan_for, partial(_push, axis_name), head, rows, moved),
        lambda cotangents: eqx.filter(
            by_platform(plan_for, partial(_pull, axis_name), head, rows, cotangents),
            jax.tree.map(lambda x: x is not None, operands, is_leaf=lambda x: x is None),
        ),
        operands,
        results,
    )
    still = vary_alike(jax.tree.map(jnp.zeros_like, measured), hidden)[0]
    return (*results, measured), (*sum_parts(pushed, axis_name, hidden), still)


_log_probs.defjvp(_log_probs_jvp, symbolic_zeros=True)


def _push(
    axis_name: str | None, tiling: Tiling, head: Unembedding, rows: tuple[Array, ...], tangents: Any
) -> tuple[Float[Array, "*batch length"], Float[Array, "*batch length"]]:
    """The pushforward: from tangents of `head` and `hidden` to those of both results.

    The tangent of a normaliser is the mean of the logits' tangents under the softmax $p$. The
    tangent of a log-probability is its own logit's tangent minus that mean.
    """
    parts = tiling.parts
    in_head, in_hidden = tangents
    (hidden, targets, normalisers, live), in_hidden = tiling.chunks((rows, in_hidden))
    zeros = jnp.zeros_like(normalisers)
    start = vary_alike((zeros, zeros), hidden)[0]

    @per_tile
    def one_part(state, index):
        tile = tile_at(head, index, parts, targets.dtype, axis_name)
        in_tile = part_at(in_head, index, parts)

        @per_tile
        def chunk(operands):
            (picked, means), in_hidden, hidden, targets, normaliser, live = operands
            logits, slopes = eqx.filter_jvp(
                lambda head, hidden: tile._replace(head=head).logits(hidden),
                (tile.head, hidden),
                (in_tile, in_hidden),
            )
            slopes = jnp.where(live[:, None], slopes, 0)
            probs = jnp.exp(jnp.where(live[:, None], logits, -jnp.inf) - normaliser[:, None])
            picked = picked + jnp.where(tile.holds(targets), slopes, 0).sum(axis=-1)
            return picked, means + (probs * slopes).sum(axis=-1)

        operands = state, in_hidden, hidden, targets, normalisers, live
        return jax.lax.map(chunk, operands), None

    picked, means = jax.lax.scan(one_part, start, jnp.arange(parts))[0]
    return tiling.tokens((picked - means, means))


def _pull(
    axis_name: str | None,
    tiling: Tiling,
    head: Unembedding,
    rows: tuple[Array, ...],
    cotangents: Any,
) -> tuple[Unembedding, Float[Array, "*batch length width"]]:
    """The transpose of `_push`: by a logit, a log-probability has the slope `(is target) - p`."""
    parts = tiling.parts
    (hidden, targets, normalisers, live), cotangents = tiling.chunks((rows, cotangents))
    wide = normalisers.dtype
    cotangents = [jnp.where(live, x, 0) for x in cotangents]

    def one_part(carry, index):
        in_head, in_hidden = carry
        tile = tile_at(head, index, parts, targets.dtype, axis_name)

        def chunk(in_tile, operands):
            in_hidden, hidden, targets, normaliser, live, cotangent, of_normaliser = operands
            logits = tile.logits(hidden)
            probs = jnp.exp(jnp.where(live[:, None], logits, -jnp.inf) - normaliser[:, None])
            at_target = jnp.where(tile.holds(targets), cotangent[:, None], 0)
            slopes = at_target - probs * (cotangent - of_normaliser)[:, None]  # (chunk, part)
            pulled = tile.head.pull(hidden, logits, slopes)
            return jax.tree.map(jnp.add, (in_tile, in_hidden), pulled)

        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, wide), tile.head)
        operands = in_hidden, hidden, targets, normalisers, live, *cotangents
        in_tile, in_hidden = jax.lax.scan(chunk, vary_alike(zeros, hidden)[0], operands)
        return (put_back(in_head, in_tile, index, parts), in_hidden), None

    zeros = jax.tree.map(jnp.zeros_like, head), jnp.zeros_like(hidden, wide)
    carry = vary_alike(zeros, hidden)[0]
    (in_head, in_hidden), _ = jax.lax.scan(one_part, carry, jnp.arange(parts))
    return in_head, tiling.tokens(in_hidden.astype(hidden.dtype))
