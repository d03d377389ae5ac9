"""The score of packed batches: `score_pairs` for rows that hold several pairs each.

`_arrays/packed.py` and `data/pack.py` make such rows.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._arrays.log_probs import PairLogProbs, TokenValues
from .._arrays.packed import PackedBatch, PackedLayout, by_pair
from .._arrays.tokens import as_ids
from .._head.predictions import Hidden
from .._head.statistics import TokenStatistics, check_metrics
from .._head.token_log_probs import sequence_log_probs
from .._jax.explicit_meshes import automatic
from .._jax.keys import Keys, keys_per_pair
from .._jax.partitioning import keep_rows, row_axes
from ..protocols import FastPolicy
from .policy_checks import check_is_policy, checked_hidden
from .predict import offers_fast_path, unembedding_of
from .rows import How, check_how, over_rows


@partial(automatic, like=1)
def score_packed(
    policy: PyTree,
    batch: PackedBatch,
    *,
    key: Keys | None = None,
    chunk_size: int | None = None,
    how: How = "vmap",
    metrics: Sequence[str] = (),
) -> PairLogProbs:
    """The log-probabilities of both completions of each pair of a packed batch.

    ```python
    step = make_step(losses.dpo, optimizer, score=score_packed)
    ```

    Each pair has the same result as in `score_pairs`, up to rounding. A pair's tokens see only
    tokens of the same pair, and have the same positions as without packing. The unembedding is
    applied to scored tokens only. A `RecurrentPolicy` gains nothing from packing, since its state
    would have to start anew within a row: run it by `score_pairs`.

    **Arguments:**

    - `policy`: must offer `FastPolicy`, as all policies in `models` do. Its `hidden` is called with
        a `PackedLayout`.
    - `batch`: from `data.pack`.
    - `key`: for dropout and other randomness: one key, which is split into one for each *row*, or
        one key for each row. The dropout masks are not the same as in `score_pairs`.
    - `chunk_size`: as in `linear_token_log_probs`.
    - `how`: `"vmap"` or `"map"`, as in `score_pairs`.
    - `metrics`: as in `score_pairs`. The values of the tokens have the shape `(pairs, scored)`: all
        scored tokens of the pair's row, and a mask that is true at those of the completion.

    **Returns:**

    As `score_pairs`, in the order of `batch.weight` and `batch.index`; zeros in empty slots.

    **Raises:**

    `ValueError` if the policy does not offer `FastPolicy` or returns an array of a wrong shape, or
    if `how` or a metric is another word.
    """
    check_metrics(metrics)
    check_how(how, ("vmap", "map"))
    _check_offers(policy)
    keys = keys_per_pair(key, batch.rows)

    def one_row(ids, lengths, scored, key):
        layout = PackedLayout(lengths, ids.size, batch.longest, batch.longest_pair)
        returned = _run(policy, keep_rows(ids), layout, key)
        hidden = checked_hidden(policy, returned, ids, policy.unembedding)
        # The fill of -1 reads the row's last token, which `_parts_of` leaves out of every sum.
        return keep_rows(hidden[layout.predicts[scored]]), ids[scored], _parts_of(layout, scored)

    ids, lengths, scored = map(as_ids, (batch.ids, batch.lengths, batch.scored))
    run = over_rows(one_row, how, row_axes(ids, policy, keys))
    hidden, targets, parts = run(ids, lengths, scored, keys)
    predictions = Hidden(hidden, unembedding_of(policy), chunk_size)
    log_probs, statistics = predictions.log_probs(targets, tuple(metrics))
    repeated = jnp.broadcast_to(log_probs[:, None, None], parts.shape)
    totals = sequence_log_probs(repeated, parts)  # (rows, slots, 2)
    counts = parts.sum(axis=-1, dtype=jnp.int32)  # (rows, slots, 2)
    return PairLogProbs(
        chosen=by_pair(totals[:, :, 0]),
        rejected=by_pair(totals[:, :, 1]),
        chosen_length=by_pair(counts[:, :, 0]),
        rejected_length=by_pair(counts[:, :, 1]),
        weight=jnp.asarray(batch.weight, log_probs.dtype),
        chosen_tokens=_values(parts[:, :, 0], log_probs, statistics) if metrics else None,
        rejected_tokens=_values(parts[:, :, 1], log_probs, statistics) if metrics else None,
    )


def _values(
    mask: Bool[Array, "rows slots scored"],
    log_probs: Float[Array, "rows scored"],
    statistics: TokenStatistics,
) -> TokenValues:
    """The values of the scored tokens of each pair's row; no gradient flows through them."""

    def of_pairs(x):
        return by_pair(jnp.broadcast_to(jax.lax.stop_gradient(x)[:, None], mask.shape))

    return TokenValues(
        by_pair(mask), of_pairs(log_probs), **jax.tree.map(of_pairs, vars(statistics))
    )


def _run(policy: FastPolicy, ids: Array, layout: PackedLayout, key: Keys | None) -> Array:
    """The policy's hidden states; explains the error if it reads the widths of a `Layout`."""
    try:
        return policy.hidden(ids, layout, key=key)
    except AttributeError as error:
        if error.obj is not layout:
            raise
        raise AttributeError(
            "A packed row has no `prompt_width` or `completion_widths`, because its parts have "
            "different widths in each row. Attend through `layout.mask()` and `layout.positions` "
            "if `layout` is a `PackedLayout`, or run the policy by `score_pairs`."
        ) from error


def _parts_of(layout: PackedLayout, scored: Array) -> Bool[Array, "slots 2 scored"]:
    """Which scored tokens belong to each slot's chosen, and which to its rejected completion."""
    slots = jnp.arange(layout.lengths.shape[0], dtype=scored.dtype)[:, None, None]
    completions = jnp.array([1, 2], scored.dtype)[None, :, None]
    scored = scored[None, None, :]
    pair, segment = layout.pairs[scored], layout.segments[scored]
    return (scored >= 0) & (pair == slots) & (segment == completions)


def _check_offers(policy: PyTree) -> None:
    check_is_policy(policy)
    if not offers_fast_path(policy):
        raise ValueError(
            "`policy` must offer `FastPolicy` to be run on several pairs in one row, by `hidden(ids"
            f", layout)` and `unembedding`; {type(policy).__name__} does not. Write both, see "
            "`help(dpo_eqx.FastPolicy)`, or use `score_pairs` with batches from `data.batches`."
        )
