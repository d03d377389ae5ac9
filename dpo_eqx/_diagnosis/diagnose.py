"""What a loss makes of each pair: margins, log-ratios, how hard the gradient pulls.

The same numbers that a step averages, before the average; means are in `_training/metrics.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PyTree

from .._arrays.batches import PreferenceBatch
from .._arrays.log_probs import PairLogProbs
from .._scoring.score import score_pairs
from .._training.objective import checked_loss
from .._training.reference import choose_reference, run_inference, run_reference
from ..protocols import Loss, Score

PerPair = Mapping[str, Float[Array | np.ndarray, " pairs"]]


class Diagnosis(eqx.Module):
    r"""Each pair under a loss, in the order of the pairs; all arrays of shape `(pairs,)`.

    A pair that is labelled the wrong way round stands out by a margin far below the others' and
    the largest gradient weight, as soon as the policy has learned from the rest.

    **Arguments:**

    - `loss`, `chosen_reward`, `rejected_reward`: what the loss returned.
    - `margin`: the difference of the rewards; below 0 the policy disagrees with the label.
    - `chosen_gradient_weight`, `rejected_gradient_weight`: $-\partial\ell / \partial\log\pi_w$ and
        $\partial\ell / \partial\log\pi_l$, how hard the pair pulls the chosen up and the rejected
        down: both $\beta\sigma(-z)$ for `losses.dpo`.
    - `chosen_log_ratio`, `rejected_log_ratio`: $\log\pi - \log\pi^{ref}$, in nats; `None` without
        a reference.
    - `policy`, `reference`: the log-probabilities themselves.
    """

    loss: Float[Array, " pairs"]
    chosen_reward: Float[Array, " pairs"]
    rejected_reward: Float[Array, " pairs"]
    margin: Float[Array, " pairs"]
    chosen_gradient_weight: Float[Array, " pairs"]
    rejected_gradient_weight: Float[Array, " pairs"]
    chosen_log_ratio: Float[Array, " pairs"] | None
    rejected_log_ratio: Float[Array, " pairs"] | None
    policy: PairLogProbs
    reference: PairLogProbs | None


def diagnose(
    loss: Loss,
    policy: PairLogProbs,
    reference: PairLogProbs | None = None,
    *,
    per_pair: PerPair | None = None,
) -> Diagnosis:
    """What `loss` makes of each pair, from log-probabilities.

    **Arguments:**

    - `loss`: a loss of pairs; of one that couples pairs the weights are those of the sum.
    - `policy`, `reference`: as the loss takes them.
    - `per_pair`: arguments of the loss by name, as in `PreferenceBatch`.

    **Raises:**

    `ValueError` where the loss needs a reference and gets none.
    """

    def total(chosen, rejected):
        moved = eqx.tree_at(lambda p: (p.chosen, p.rejected), policy, (chosen, rejected))
        result = checked_loss(loss, loss(moved, reference, **(per_pair or {})), chosen.shape)
        return result.loss.sum(), result

    log_probs = jnp.asarray(policy.chosen), jnp.asarray(policy.rejected)
    (up, down), result = jax.grad(total, argnums=(0, 1), has_aux=True)(*log_probs)
    ratios = (None, None)
    if reference is not None:
        theirs = reference.chosen, reference.rejected
        ratios = tuple(a - jnp.asarray(b) for a, b in zip(log_probs, theirs, strict=True))
    return Diagnosis(
        result.loss,
        result.chosen_reward,
        result.rejected_reward,
        result.chosen_reward - result.rejected_reward,
        -up,
        down,
        *ratios,
        policy=policy,
        reference=reference,
    )


def make_diagnose(
    loss: Loss,
    *,
    score: Score = score_pairs,
    compute_dtype: DTypeLike | None = None,
    reference_of: Callable[[Any], Any] | None = None,
) -> Callable[..., Diagnosis]:
    """`make_eval` without the means: what the loss makes of each pair of a batch.

    ```python
    examine = eqx.filter_jit(make_diagnose(loss))
    suspects = jnp.argsort(examine(policy, batch, reference).margin)[:20]
    ```

    **Arguments:**

    Those of `make_grad`.

    **Returns:**

    A pure function, not jitted, of `(policy, batch, reference=None)`, which runs both in inference
    mode and returns a `Diagnosis`. Rows of weight 0 are in it like all others.

    **Raises:**

    `ValueError` at trace time, as `make_grad`.
    """

    def examine(
        policy: PyTree, batch: PreferenceBatch, reference: PyTree | None = None
    ) -> Diagnosis:
        reference = choose_reference(policy, batch, reference, reference_of)
        options = {"score": score, "compute_dtype": compute_dtype}
        given = batch.reference
        if reference is not None:
            given = run_reference(reference, batch, **options)
        log_probs = run_inference(policy, batch, **options)
        return diagnose(loss, log_probs, given, per_pair=batch.per_pair)

    return examine
