"""Compares a policy with its reference on the same completions, at every scored token.

Losses and means are not here; `diagnose.py` and `preferences.py` have them.
"""

from functools import partial
from typing import overload

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._arrays.batches import PreferenceBatch
from .._arrays.log_probs import PairLogProbs
from .._head.predictions import kl_between
from .._head.token_log_probs import sequence_log_probs
from .._jax.explicit_meshes import automatic
from .._scoring.policy_checks import as_reference
from .._scoring.predict import gives_hidden, predict
from .._scoring.score import pair_log_probs, token_scores
from ..protocols import Score


class Comparison(eqx.Module):
    r"""A policy compared with its reference, on both completions of each pair.

    **Arguments:**

    - `policy`, `reference`: their log-probabilities, as from `score_pairs`.
    - `chosen_tokens`, `rejected_tokens`: the contribution of each token to the log-ratio,
        $\log\pi(y_t | x, y_{<t}) - \log\pi^{ref}(y_t | x, y_{<t})$ in nats; 0 for a token that
        is not scored. Shape `(pairs, completion)`.
    - `chosen_kl`, `rejected_kl`: $\sum_t \mathrm{KL}(\pi(\cdot | x, y_{<t}) \,\|\,
        \pi^{ref}(\cdot | x, y_{<t}))$ over the scored positions, each over the whole vocabulary,
        in nats. Shape `(pairs,)`.
    """

    policy: PairLogProbs
    reference: PairLogProbs
    chosen_tokens: Float[Array, "pairs completion"]
    rejected_tokens: Float[Array, "pairs completion"]
    chosen_kl: Float[Array, " pairs"]
    rejected_kl: Float[Array, " pairs"]


class ScoredComparison(eqx.Module):
    """A policy compared with its reference by a score, which returns sums over tokens only.

    **Arguments:**

    - `policy`, `reference`: their log-probabilities of both completions of each pair.
    """

    policy: PairLogProbs
    reference: PairLogProbs


@overload
def compare(
    policy: PyTree,
    reference: PyTree,
    batch: PreferenceBatch,
    *,
    chunk_size: int | None = None,
    score: None = None,
) -> Comparison: ...


@overload
def compare(
    policy: PyTree,
    reference: PyTree,
    batch: PreferenceBatch,
    *,
    chunk_size: int | None = None,
    score: Score[PairLogProbs],
) -> ScoredComparison: ...


def compare(
    policy: PyTree,
    reference: PyTree,
    batch: PreferenceBatch,
    *,
    chunk_size: int | None = None,
    score: Score[PairLogProbs] | None = None,
) -> Comparison | ScoredComparison:
    r"""Compares policy and reference on each completion: log-ratios by token, and KL divergences.

    Each of the two is run once, as `score_pairs` runs it. If both offer `FastPolicy` or
    `RecurrentPolicy`, the logits are never built. The KL compares the distributions at each
    position, given the tokens before it in the batch. On completions that the policy wrote, its
    mean estimates the KL of whole answers. On other completions, it shows how far the policy has
    moved there. Gradients flow into both.

    **Arguments:**

    - `policy`, `reference`: as in `score_pairs`, with the same vocabulary. Pass
        `eqx.nn.inference_mode(policy)` if a policy has dropout.
    - `batch`: the pairs; its own `reference` is not used.
    - `chunk_size`: as in `linear_kl`, used if the logits are never built.
    - `score`: another score, such as `pseudo_score(mask_id)`. The result is then a
        `ScoredComparison`, without tokens and KL divergences.

    **Raises:**

    `ValueError` if the vocabularies differ, or a policy returns an array of a wrong shape.
    """
    if score is not None:
        ours = score(policy, batch, key=None)
        with as_reference():
            return ScoredComparison(ours, score(reference, batch, key=None))
    is_hidden = any(map(gives_hidden, (policy, reference)))
    run = partial(automatic, like=2)(_compare) if is_hidden else _compare
    return run(policy, reference, batch, chunk_size)


def _compare(
    policy: PyTree, reference: PyTree, batch: PreferenceBatch, chunk_size: int | None
) -> Comparison:
    pair = batch.chosen, batch.rejected
    run = partial(predict, keys=None, chunk_size=chunk_size)
    predictions = [run(policy, batch.prompt, pair)]
    with as_reference():
        predictions.append(run(reference, batch.prompt, pair))
    policy_scores, reference_scores = (token_scores(p, pair) for p in predictions)
    chosen_tokens, rejected_tokens = (
        jnp.where(tokens.mask, a.log_probs - b.log_probs, 0)
        for tokens, a, b in zip(pair, policy_scores, reference_scores, strict=True)
    )
    # The completions lie one after the other, as `predict` concatenates them.
    kl = kl_between(*predictions)
    halves = jnp.split(kl, [batch.chosen.ids.shape[1]], axis=1)
    chosen_kl, rejected_kl = (
        sequence_log_probs(half, tokens.mask) for half, tokens in zip(halves, pair, strict=True)
    )
    return Comparison(
        policy=pair_log_probs(batch, *policy_scores),
        reference=pair_log_probs(batch, *reference_scores),
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
    )
