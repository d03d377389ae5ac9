"""The score of masked models: each token is predicted with itself masked.

Causal policies are scored in `score.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._arrays.batches import PreferenceBatch
from .._arrays.kinds import check_kind
from .._arrays.log_probs import PairLogProbs
from .._arrays.tokens import Tokens, as_ids
from .._head.token_log_probs import token_log_probs
from .._jax.keys import Keys, keys_per_pair
from ..protocols import Score
from .policy_checks import call_policy, check_is_policy
from .predict import without_padding
from .score import TokenScores, pair_log_probs


def pseudo_score(mask_id: int, *, groups: int | None = None) -> Score[PairLogProbs]:
    r"""A score for masked models: the pseudo-log-likelihood of each completion.

    $\sum_t \log p(y_t | x, y_{\setminus t})$ over the scored tokens: the policy is run with token
    $t$ replaced by `mask_id`, and the logits at $t$ are the distribution of $y_t$ itself. It need
    not be causal.

    ```python
    step = make_step(losses.dpo, optimizer, score=pseudo_score(mask_id=32))
    ```

    A model without causality sees the padding behind a row. Rows are padded with the token 0, so
    the model must ignore that token, or all rows of a batch must have one length.

    **Arguments:**

    - `mask_id`: the token that replaces a masked token.
    - `groups`: the number of runs for each completion. Run $g$ masks the tokens $g$, $g + n$,
        $g + 2n$, ... of the completion at once, for $n$ groups, and so approximates the sum
        (default: one token at a time, which is exact and takes one run for each token).

    **Returns:**

    A score, `(policy, batch, *, key=None) -> PairLogProbs`. The runs are made one after the other
    by `lax.map`, so that memory does not grow with them.

    **Raises:**

    `ValueError` if `mask_id` is negative or `groups` is not positive.

    ??? cite

        Salazar et al., *Masked Language Model Scoring*, ACL 2020, equation 1.
    """
    if mask_id < 0:
        raise ValueError(f"`mask_id` must be the id of the mask token, 0 or more; got {mask_id}.")
    if groups is not None and groups < 1:
        raise ValueError(f"`groups` must be at least 1, or left out; got {groups}.")

    def score(policy: PyTree, batch: PreferenceBatch, *, key: Keys | None = None) -> PairLogProbs:
        check_is_policy(policy)
        check_kind(batch, "prompt", "chosen", "rejected", score="pseudo_score")
        keys = keys_per_pair(key, batch.pairs)
        of_tokens = partial(_token_scores, policy, batch.prompt, mask_id=mask_id, groups=groups)
        # One key for each completion, as in `score_pairs`.
        split = None if keys is None else jax.vmap(jax.random.split)(keys)
        sides = enumerate((batch.chosen, batch.rejected))
        return pair_log_probs(
            batch, *(of_tokens(side, None if split is None else split[:, i]) for i, side in sides)
        )

    return score


def _token_scores(
    policy: PyTree,
    prompt: Tokens,
    completion: Tokens,
    keys: Keys | None,
    *,
    mask_id: int,
    groups: int | None,
) -> TokenScores:
    """The log-probability of each token of one completion of each prompt."""
    lengths = jnp.asarray(prompt.mask).sum(axis=1, dtype=jnp.int32)
    width = completion.ids.shape[1]
    one_row = partial(_row_log_probs, policy, mask_id=mask_id, groups=groups or max(width, 1))
    completion = without_padding(completion)
    ids, mask = jnp.asarray(completion.ids), jnp.asarray(completion.mask)
    rows = jax.vmap(one_row)(as_ids(prompt.ids), lengths, ids, mask, keys)
    return TokenScores(rows, None, completion.mask)


def _row_log_probs(
    policy: Any,
    prompt: Int[Array, " prompt"],
    length: Int[Array, ""],
    completion: Int[Array, " completion"],
    scored: Bool[Array, " completion"],
    key: Keys | None,
    *,
    mask_id: int,
    groups: int,
) -> Float[Array, " completion"]:
    """The log-probability of each token of one completion, from `groups` runs of the policy."""
    # Beyond the prompt's length are its padding, and then the completion's: all become 0.
    blank = jnp.where(jnp.arange(prompt.size, dtype=jnp.int32) < length, prompt, 0)
    blank = jnp.concatenate([blank, jnp.zeros_like(completion)])
    places = jnp.arange(completion.size, dtype=jnp.int32)

    def run(group: Int[Array, ""]) -> Float[Array, " completion"]:
        is_masked = (places % groups == group) & scored
        hidden = jnp.where(is_masked, mask_id, completion)
        row = jax.lax.dynamic_update_slice(blank, hidden, (length,))
        logits = call_policy(policy, row, key)
        own = jax.lax.dynamic_slice_in_dim(logits, length, completion.size)
        log_probs = token_log_probs(own, jnp.where(is_masked, completion, 0))
        return jnp.where(is_masked, log_probs, 0)

    return jax.lax.map(run, jnp.arange(groups, dtype=jnp.int32)).sum(axis=0)
