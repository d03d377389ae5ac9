"""The scores of packed batches: `score_pairs` and `score_unpaired` for rows that hold several.

`_arrays/packed.py` and `data/pack.py` make such rows.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._arrays.kinds import check_kind
from .._arrays.log_probs import PairLogProbs, TokenValues, UnpairedLogProbs
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

    `ValueError` if the policy does not offer `FastPolicy` or returns an array of a wrong shape, if
    the batch holds single completions, or if `how` or a metric is another word.
    """
    check_kind(batch, "ids", "lengths", "scored", score="score_packed")
    if batch.label is not None:
        raise ValueError(
            "`batch` must hold pairs for `score_packed`; got single completions. Take "
            "`score_packed_unpaired`."
        )
    chosen, rejected = _completions(policy, batch, (1, 2), key, chunk_size, how, metrics)
    return PairLogProbs(
        chosen=chosen.total(),
        rejected=rejected.total(),
        chosen_length=chosen.length(),
        rejected_length=rejected.length(),
        weight=_weight(batch, chosen),
        chosen_tokens=chosen.values(),
        rejected_tokens=rejected.values(),
    )


@partial(automatic, like=1)
def score_packed_unpaired(
    policy: PyTree,
    batch: PackedBatch,
    *,
    key: Keys | None = None,
    chunk_size: int | None = None,
    how: How = "vmap",
    metrics: Sequence[str] = (),
) -> UnpairedLogProbs:
    """The log-probabilities of the single completions of a packed batch.

    ```python
    step = make_step(losses.sft, optimizer, score=score_packed_unpaired)
    ```

    Each completion has the same result as in `score_unpaired`, up to rounding; there are no
    mismatched completions. Arguments and errors are as in `score_packed`, except that the batch
    must hold single completions.
    """
    check_kind(batch, "ids", "lengths", "scored", score="score_packed_unpaired")
    if batch.label is None:
        raise ValueError(
            "`batch` must hold single completions for `score_packed_unpaired`; got pairs. Take "
            "`score_packed`."
        )
    (completion,) = _completions(policy, batch, (1,), key, chunk_size, how, metrics)
    return UnpairedLogProbs(
        completion=completion.total(),
        label=jnp.asarray(batch.label),
        length=completion.length(),
        weight=_weight(batch, completion),
        tokens=completion.values(),
    )


class _Completions(NamedTuple):
    """One completion of every slot: the values of the scored tokens of its row, and its own ones.

    The results have one axis of pairs, as `by_pair` makes it.
    """

    log_probs: Float[Array, "rows scored"]
    mask: Bool[Array, "rows slots scored"]
    statistics: TokenStatistics | None

    def total(self) -> Float[Array, " pairs"]:
        repeated = jnp.broadcast_to(self.log_probs[:, None], self.mask.shape)
        return jnp.asarray(by_pair(sequence_log_probs(repeated, self.mask)))

    def length(self) -> Int[Array, " pairs"]:
        return jnp.asarray(by_pair(self.mask.sum(axis=-1, dtype=jnp.int32)))

    def values(self) -> TokenValues | None:
        """What metrics are made of, if they were asked for; no gradient flows through it."""
        if self.statistics is None:
            return None

        def of_pairs(x):
            x = jax.lax.stop_gradient(x)[:, None]
            return by_pair(jnp.broadcast_to(x, self.mask.shape))

        statistics = jax.tree.map(of_pairs, vars(self.statistics))
        return TokenValues(by_pair(self.mask), of_pairs(self.log_probs), **statistics)


def _weight(batch: PackedBatch, completion: _Completions) -> Float[Array, " pairs"]:
    return jnp.asarray(batch.weight, completion.log_probs.dtype)


def _completions(
    policy: PyTree,
    batch: PackedBatch,
    segments: tuple[int, ...],
    key: Keys | None,
    chunk_size: int | None,
    how: How,
    metrics: Sequence[str],
) -> list[_Completions]:
    """The completions that are these segments of a `PackedLayout`."""
    check_metrics(metrics)
    check_how(how, ("vmap", "map"))
    _check_offers(policy)
    keys = keys_per_pair(key, batch.rows)
    parts_of = partial(_parts_of, segments=segments)

    def one_row(ids, lengths, scored, key):
        layout = PackedLayout(lengths, ids.size, batch.longest, batch.longest_pair)
        returned = _run(policy, keep_rows(ids), layout, key)
        hidden = checked_hidden(policy, returned, ids, policy.unembedding)
        # The fill of -1 reads the row's last token, which `_parts_of` leaves out of every sum.
        return keep_rows(hidden[layout.predicts[scored]]), ids[scored], parts_of(layout, scored)

    ids, lengths, scored = map(as_ids, (batch.ids, batch.lengths, batch.scored))
    run = over_rows(one_row, how, row_axes(ids, policy, keys))
    hidden, targets, parts = run(ids, lengths, scored, keys)
    predictions = Hidden(hidden, unembedding_of(policy), chunk_size)
    log_probs, statistics = predictions.log_probs(targets, tuple(metrics))
    return [
        _Completions(log_probs, parts[:, :, place], statistics if metrics else None)
        for place in range(len(segments))
    ]


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


def _parts_of(
    layout: PackedLayout, scored: Int[Array, " scored"], segments: tuple[int, ...]
) -> Bool[Array, "slots completions scored"]:
    """Which scored tokens belong to each of these segments of each slot."""
    slots = jnp.arange(layout.lengths.shape[0], dtype=scored.dtype)[:, None, None]
    wanted = jnp.array(segments, scored.dtype)[None, :, None]
    scored = scored[None, None, :]
    pair, segment = layout.pairs[scored], layout.segments[scored]
    return (scored >= 0) & (pair == slots) & (segment == wanted)


def _check_offers(policy: PyTree) -> None:
    check_is_policy(policy)
    if not offers_fast_path(policy):
        raise ValueError(
            "`policy` must offer `FastPolicy` to be run on several pairs in one row, by `hidden(ids"
            f", layout)` and `unembedding`; {type(policy).__name__} does not. Write both, see "
            "`help(dpo_eqx.FastPolicy)`, or use `score_pairs` with batches from `data.batches`."
        )
