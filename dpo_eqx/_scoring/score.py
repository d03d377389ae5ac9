"""Scores: functions that run a policy on a batch, and return each completion's log-probability.

A score is any function of the form `(policy, batch, *, key) -> log-probabilities`. Losses and
gradients are not here.
"""

from collections.abc import Sequence
from itertools import accumulate
from numbers import Real

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._arrays.batches import PreferenceBatch, UnpairedBatch
from .._arrays.kinds import check_kind
from .._arrays.log_probs import PairLogProbs, TokenValues, UnpairedLogProbs
from .._arrays.tokens import Tokens, as_ids
from .._head.predictions import AbstractPrediction
from .._head.statistics import TokenStatistics, check_metrics
from .._head.token_log_probs import sequence_log_probs
from .._jax.explicit_meshes import automatic
from .._jax.keys import Keys, keys_per_pair
from .._jax.scalars import Number
from ..protocols import Score
from .predict import gives_hidden, predict
from .rows import How


def score_pairs(
    policy: PyTree,
    batch: PreferenceBatch,
    *,
    key: Keys | None = None,
    chunk_size: int | None = None,
    confidence: bool = False,
    how: How = "vmap",
    metrics: Sequence[str] = (),
) -> PairLogProbs:
    """The log-probabilities of both completions of each pair under `policy`.

    Any policy is called as `policy(ids)`, once for each sequence, on the real tokens of prompt and
    completion, contiguous and padded on the right. A policy that offers `FastPolicy` is run only
    once for each pair, with the same result: the prompt is encoded once for both completions, and
    the logits are never built. A policy that offers `RecurrentPolicy` reads the prompt once, and
    each completion from the state after it.

    **Arguments:**

    - `policy`: a callable pytree from `ids`, of shape `(length,)`, to logits `(length, vocab)`. It
        must be causal. It is called as `policy(ids, key=key)` if a key is given.
    - `batch`: the pairs.
    - `key`: for dropout and other randomness: one key, which is split into one for each pair, or
        one key for each pair. With one key for each pair, a pair's dropout masks are the same in
        every batch, except with keys of the kinds `rbg` and `unsafe_rbg`: under `vmap` JAX draws
        their numbers for the whole batch from its first key.
    - `chunk_size`: as in `linear_token_log_probs`, for a `FastPolicy` or a `RecurrentPolicy`; other
        policies ignore it.
    - `confidence`: whether to compute the confidences that `losses.wpo` needs.
    - `how`: the way to run all rows. `"vmap"` maps the policy over them. `"map"` runs one row after
        the other in a loop, for a policy that cannot be mapped by `vmap`, or to save memory without
        a gradient. `"batch"` is for a policy that takes a batch: it is called once, with `ids` of
        shape `(rows, length)`, and returns logits `(rows, length, vocab)`. It gets the key of the
        first pair, so its dropout masks depend on the batch. Choose one for a step by
        `score=functools.partial(score_pairs, how="map")`.
    - `metrics`: further metrics of each token: `"entropy"`, `"accuracy"` (whether the target has
        the highest logit) and `"logits"` (their mean over the vocabulary), from the same pass over
        the logits; `"log_probs"` gives the log-probabilities of single tokens. They are
        `chosen_tokens` and `rejected_tokens` of the result, and `default_metrics` averages them.

    **Returns:**

    Log-probabilities summed over the scored tokens, in nats, float32 or wider; the numbers of
    scored tokens; and the batch's weights. An empty completion has log-probability 0. A scored
    token outside the vocabulary makes its sequence NaN, so that a wrong tokenizer is noticed.

    **Raises:**

    `ValueError` if the policy returns an array of a wrong shape, if `how` is another word, if a
    metric has no such name, or if the number of keys is not the number of pairs.
    """
    check_kind(batch, "prompt", "chosen", "rejected", score="score_pairs")
    completions = batch.chosen, batch.rejected
    chosen, rejected = _token_scores(
        policy, batch.prompt, completions, key, chunk_size, how, confidence, metrics
    )
    return pair_log_probs(batch, chosen, rejected)


def score_unpaired(
    policy: PyTree,
    batch: UnpairedBatch,
    *,
    key: Keys | None = None,
    chunk_size: int | None = None,
    how: How = "vmap",
    metrics: Sequence[str] = (),
) -> UnpairedLogProbs:
    """The log-probabilities of single completions, and of KTO's mismatched completions if given.

    Arguments, errors and the fast path are as in `score_pairs`. No gradient flows through `kl`,
    which the losses treat as a constant.
    """
    check_kind(batch, "prompt", "completion", "label", score="score_unpaired")
    completions = (batch.completion,) if batch.kl is None else (batch.completion, batch.kl)
    completion, *kl = _token_scores(
        policy, batch.prompt, completions, key, chunk_size, how, metrics=metrics
    )
    return UnpairedLogProbs(
        completion=completion.total(),
        label=jnp.asarray(batch.label),
        kl=jax.lax.stop_gradient(kl[0].total()) if kl else None,
        length=completion.length(),
        weight=_weight(batch, completion.log_probs),
        tokens=completion.values(),
    )


def ld_score(alpha: Number) -> Score[PairLogProbs]:
    r"""Length-desensitised scores: `score_pairs` with less weight on the longer answer's surplus.

    The log-probabilities of tokens past the length of the shorter completion are multiplied by
    `alpha`: $\sum_{t \le m} \log p_t + \alpha \sum_{t > m} \log p_t$ with
    $m = \min(n_w, n_l)$, in policy and reference alike.

    ```python
    step = make_step(losses.dpo, optimizer, score=ld_score(0.5))
    ```

    **Arguments:**

    - `alpha`: a number in `[0, 1]`, or a traced scalar. 1 gives `score_pairs`; 0 ignores the longer
        completion's surplus.

    **Returns:**

    A score, `(policy, batch, *, key=None, chunk_size=None, how="vmap") -> PairLogProbs`. The
    lengths count all scored tokens, including the surplus.

    **Raises:**

    `ValueError` if `alpha` is a number out of range.

    ??? cite

        Liu et al., *Length Desensitization in Direct Preference Optimization*, 2024 (arXiv
        2409.06411).
    """
    if isinstance(alpha, Real) and not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1]; got {alpha}.")

    def score(
        policy: PyTree,
        batch: PreferenceBatch,
        *,
        key: Keys | None = None,
        chunk_size: int | None = None,
        how: How = "vmap",
    ) -> PairLogProbs:
        check_kind(batch, "prompt", "chosen", "rejected", score="ld_score")
        completions = batch.chosen, batch.rejected
        pair = _token_scores(policy, batch.prompt, completions, key, chunk_size, how)
        lengths = [tokens.length() for tokens in pair]
        shorter = jnp.minimum(*lengths)[:, None]

        def desensitised(tokens: TokenScores) -> Float[Array, " pairs"]:
            surplus = jnp.cumsum(tokens.mask, axis=1, dtype=jnp.int32) > shorter
            return sequence_log_probs(
                jnp.where(surplus, alpha * tokens.log_probs, tokens.log_probs), tokens.mask
            )

        return PairLogProbs(
            *map(desensitised, pair), *lengths, weight=_weight(batch, pair[0].log_probs)
        )

    return score


class TokenScores(eqx.Module):
    """The log-probability of each token of one completion of each prompt, with the loss mask."""

    log_probs: Float[Array, "pairs completion"]
    collisions: Float[Array, "pairs completion"] | None
    mask: Bool[Array | np.ndarray, "pairs completion"]
    statistics: TokenStatistics | None = None

    def values(self) -> TokenValues | None:
        """What metrics are made of, if they were asked for; no gradient flows through it."""
        if self.statistics is None:
            return None
        log_probs = jax.lax.stop_gradient(self.log_probs)
        return TokenValues(jnp.asarray(self.mask), log_probs, **vars(self.statistics))

    def total(self) -> Float[Array, " pairs"]:
        return sequence_log_probs(self.log_probs, self.mask)

    def length(self) -> Int[Array, " pairs"]:
        return jnp.asarray(self.mask).sum(axis=1, dtype=jnp.int32)

    def confidence(self) -> Float[Array, " pairs"] | None:
        r"""WPO's $\exp(\text{mean}_t[\log p_t - \log\sum_v p_{t,v}^2])$, detached; 1 if empty."""
        if self.collisions is None:
            return None
        excess = jax.lax.stop_gradient(self.log_probs) - self.collisions
        count = jnp.maximum(self.length(), 1).astype(excess.dtype)
        return jnp.exp(sequence_log_probs(excess, self.mask) / count)


def pair_log_probs(
    batch: PreferenceBatch, chosen: TokenScores, rejected: TokenScores
) -> PairLogProbs:
    """The sums over the tokens of each completion of `batch`, with its lengths and weights."""
    return PairLogProbs(
        chosen=chosen.total(),
        rejected=rejected.total(),
        chosen_length=chosen.length(),
        rejected_length=rejected.length(),
        weight=_weight(batch, chosen.log_probs),
        chosen_confidence=chosen.confidence(),
        rejected_confidence=rejected.confidence(),
        chosen_tokens=chosen.values(),
        rejected_tokens=rejected.values(),
    )


def _token_scores(
    policy: PyTree,
    prompt: Tokens,
    completions: Sequence[Tokens],
    key: Keys | None,
    chunk_size: int | None,
    how: How,
    confidence: bool = False,
    metrics: Sequence[str] = (),
) -> list[TokenScores]:
    """The scores of each completion, in order."""
    check_metrics(metrics)

    def run(prompt, completions, policy, key):
        keys = keys_per_pair(key, prompt.ids.shape[0])
        predictions = predict(
            policy, prompt, completions, keys=keys, chunk_size=chunk_size, how=how
        )
        return token_scores(predictions, completions, confidence, metrics)

    # A plain policy may name shardings itself, so explicit axes of a mesh stay explicit for it.
    run = automatic(run) if gives_hidden(policy, how) else run
    return run(prompt, completions, policy, key)


def token_scores(
    predictions: AbstractPrediction,
    completions: Sequence[Tokens],
    confidence: bool = False,
    metrics: Sequence[str] = (),
) -> list[TokenScores]:
    """The scores of each completion, from the concatenated predictions of all completions."""
    mask = jnp.concatenate([completion.mask for completion in completions], axis=1)
    ids = jnp.concatenate([as_ids(completion.ids) for completion in completions], axis=1)
    log_probs, statistics = predictions.log_probs(jnp.where(mask, ids, 0), tuple(metrics))
    collisions = predictions.collisions() if confidence else None
    widths = [completion.ids.shape[1] for completion in completions]
    ends = list(accumulate(widths))
    return [
        TokenScores(
            log_probs[:, end - width : end],
            None if collisions is None else collisions[:, end - width : end],
            completion.mask,
            _columns(statistics, end - width, end) if metrics else None,
        )
        for completion, width, end in zip(completions, widths, ends, strict=True)
    ]


def _columns(statistics: TokenStatistics, start: int, end: int) -> TokenStatistics:
    """The statistics of the positions from `start` to `end`."""
    return jax.tree.map(lambda x: x[:, start:end], statistics)


def _weight(
    batch: PreferenceBatch | UnpairedBatch, log_probs: Float[Array, "pairs completion"]
) -> Float[Array, " pairs"] | None:
    return None if batch.weight is None else jnp.asarray(batch.weight, log_probs.dtype)
