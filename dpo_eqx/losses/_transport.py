"""`aot`, `aot_unpaired`: alignment by optimal transport.

They compare sorted log-ratios over the whole batch. This couples the pairs, so the step runs the
policy's forward pass twice if it accumulates over microbatches.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._arrays.log_probs import PairLogProbs
from .._arrays.loss_values import PairLoss
from ._checks import check_positive, check_range
from ._dpo import smoothed
from ._form import Scalar, log_ratios, require_reference
from ._marks import couples_pairs
from ._numerics import difference, wide


@couples_pairs
def aot(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> PairLoss:
    r"""Alignment via Optimal Transport, paired: the policy's margins dominate the reference's.

    $u = \log\pi(y_w) - \log\pi(y_l)$ and $v = \log\pi_{ref}(y_w) - \log\pi_{ref}(y_l)$ are each
    sorted over the batch. With $z = \beta(u_{(i)} - v_{(i)})$ for the rank $i$ of the pair in $u$:
    $\mathcal{L} = -(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z)$.

    Differs from TRL 1.16 only in the order: losses come in the order of the pairs, not of $u$.
    Couples pairs: the sort is over the global batch. Weights scale the losses, not the ranks. Rows
    of weight 0 are left out of the sort, and their loss is 0.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `label_smoothing`: $\epsilon$, in `[0, 0.5)`.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or a Python number is out of range.

    ??? cite

        Melnyk et al., *Distributional Preference Alignment of LLMs via Optimal Transport*, 2024
        (arXiv 2406.05882).
    """
    check_positive(beta=beta)
    check_range(label_smoothing=label_smoothing, low=0, below=0.5)
    reference = jax.lax.stop_gradient(require_reference(reference, needed_by="aot"))
    chosen, rejected = log_ratios(policy, reference, needed_by="aot")
    margins = difference(wide(policy.chosen), wide(policy.rejected))
    targets = difference(wide(reference.chosen), wide(reference.rejected))
    loss = _transported(margins, targets, policy.weight, beta, label_smoothing)
    return PairLoss(loss, beta * chosen, beta * rejected)


@couples_pairs
def aot_unpaired(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
) -> PairLoss:
    r"""Alignment via Optimal Transport, unpaired: chosen rewards dominate the rejected ones.

    As `aot`, with $u = \rho_w$ and $v = \rho_l$: the result does not depend on which rejected
    completion belongs to which chosen one. A loss is at the place of its chosen completion. TRL's
    older name is `aot_pair`.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `label_smoothing`: $\epsilon$, in `[0, 0.5)`.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or a Python number is out of range.

    ??? cite

        Melnyk et al., *Distributional Preference Alignment of LLMs via Optimal Transport*, 2024
        (arXiv 2406.05882).
    """
    check_positive(beta=beta)
    check_range(label_smoothing=label_smoothing, low=0, below=0.5)
    chosen, rejected = log_ratios(policy, reference, needed_by="aot_unpaired")
    loss = _transported(chosen, rejected, policy.weight, beta, label_smoothing)
    return PairLoss(loss, beta * chosen, beta * rejected)


def _transported(
    u: Float[Array, " pairs"],
    v: Float[Array, " pairs"],
    weight: Float[Array | np.ndarray, " pairs"] | None,
    beta: Scalar,
    label_smoothing: Scalar,
) -> Float[Array, " pairs"]:
    included = jnp.ones(u.shape, bool) if weight is None else jnp.asarray(weight) > 0
    # Rows that are left out become 0, also before the sort, since they may hold NaN.
    u, v = jnp.where(included, u, 0), jnp.where(included, v, 0)
    matched = jnp.zeros_like(v).at[_order(u, included)].set(v[_order(v, included)])
    return jnp.where(included, smoothed(beta * (u - matched), label_smoothing), 0)


def _order(values: Float[Array, " pairs"], included: Bool[Array, " pairs"]) -> Int[Array, " pairs"]:
    """The ascending order. Rows left out are at the end of both sorts, and so match each other."""
    return jnp.lexsort((jax.lax.stop_gradient(values), ~included))
