"""The values of a loss for each pair: margins, log-ratios, and gradient weights.

A step averages the same numbers; means are in `_training/metrics.py`.
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

# Arguments of a loss by name, one value for each pair.
LossArguments = Mapping[str, Float[Array | np.ndarray, " pairs"]]


class Diagnosis(eqx.Module):
    r"""The diagnosis of each pair under a loss, in order; all arrays have shape `(pairs,)`.

    Once the policy has learned from the other pairs, a pair with a flipped label stands out: its
    margin is far below the others, and its gradient weight is the largest.

    **Arguments:**

    - `loss`, `chosen_reward`, `rejected_reward`: the result of the loss.
    - `margin`: the difference of the rewards; below 0 the policy disagrees with the label.
    - `chosen_gradient_weight`, `rejected_gradient_weight`: $-\partial\ell / \partial\log\pi_w$ and
        $\partial\ell / \partial\log\pi_l$: how strongly the pair pulls the chosen completion up
        and the rejected one down. Both are $\beta\sigma(-z)$ for `losses.dpo`.
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
    per_pair: LossArguments | None = None,
) -> Diagnosis:
    """Diagnoses each pair under `loss`, from log-probabilities.

    **Arguments:**

    - `loss`: a loss on pairs. If it couples pairs, the gradient weights are derivatives of the sum
        of all losses.
    - `policy`, `reference`: the arguments of the loss.
    - `per_pair`: arguments of the loss by name, as in `PreferenceBatch`.

    **Raises:**

    `ValueError` if the loss needs a reference and gets none.
    """

    def total(chosen, rejected):
        replaced = eqx.tree_at(lambda p: (p.chosen, p.rejected), policy, (chosen, rejected))
        result = checked_loss(loss, loss(replaced, reference, **(per_pair or {})), chosen.shape)
        return result.loss.sum(), result

    log_probs = jnp.asarray(policy.chosen), jnp.asarray(policy.rejected)
    (up, down), result = jax.grad(total, argnums=(0, 1), has_aux=True)(*log_probs)
    ratios = (None, None)
    if reference is not None:
        reference_log_probs = reference.chosen, reference.rejected
        sides = zip(log_probs, reference_log_probs, strict=True)
        ratios = tuple(ours - jnp.asarray(other) for ours, other in sides)
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
    """`make_eval` without the means: diagnoses each pair of a batch under the loss.

    ```python
    examine = eqx.filter_jit(make_diagnose(loss))
    suspects = jnp.argsort(examine(policy, batch, reference).margin)[:20]
    ```

    **Arguments:**

    As in `make_grad`.

    **Returns:**

    A pure function, not jitted, of `(policy, batch, reference=None)`. It runs both policies in
    inference mode and returns a `Diagnosis`, which includes pairs of weight 0.

    **Raises:**

    `ValueError` at trace time, as `make_grad`.
    """

    def examine(
        policy: PyTree, batch: PreferenceBatch, reference: PyTree | None = None
    ) -> Diagnosis:
        reference = choose_reference(policy, batch, reference, reference_of)
        options = {"score": score, "compute_dtype": compute_dtype}
        reference_log_probs = batch.reference
        if reference is not None:
            reference_log_probs = run_reference(reference, batch, **options)
        log_probs = run_inference(policy, batch, **options)
        return diagnose(loss, log_probs, reference_log_probs, per_pair=batch.per_pair)

    return examine
