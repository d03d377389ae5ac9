r"""`xpo`: DPO with a bonus for exploration, for pairs that policy and reference wrote together.

It does not draw the pairs; `docs/online.md` shows a round.
"""

from jax.nn import log_sigmoid

from .._arrays.log_probs import PairLogProbs
from .._arrays.loss_values import PairLoss
from ._checks import check_nonnegative, check_positive
from ._form import Scalar, log_ratios
from ._numerics import times, wide


def xpo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    alpha: Scalar = 1e-5,
    chosen_is_reference: Scalar | None = None,
) -> PairLoss:
    r"""Exploratory Preference Optimisation: online DPO that leaves what the reference writes.

    In each pair the policy drew one completion and the reference the other, $\tilde y$:
    $\mathcal{L} = -\log\sigma(\beta(\rho_w - \rho_l)) + \alpha\log\pi(\tilde y)$. The second term
    makes $\tilde y$ less likely, so that the policy goes on to new completions.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `alpha`: $\alpha$, the strength of the exploration. Not negative; with 0 it is DPO.
    - `chosen_is_reference`: 1 if the reference drew the chosen completion, 0 if it drew the
        rejected one. In a step, `batch.per_pair["chosen_is_reference"]`.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` or `chosen_is_reference` is missing, or a Python
    number is out of range.

    ??? cite

        Xie et al., *Exploratory Preference Optimization*, 2024, algorithm 1 (arXiv 2405.21046); the
        formula was checked against the code of TRL and of oat.
    """
    check_positive(beta=beta)
    check_nonnegative(alpha=alpha)
    chosen, rejected = log_ratios(policy, reference, needed_by="xpo")
    if chosen_is_reference is None:
        raise ValueError(
            "`xpo` needs `chosen_is_reference`, 1 for each pair whose chosen completion the "
            "reference drew and 0 for the others, and got none. In a step, put an array of shape "
            '`(pairs,)` into `batch.per_pair["chosen_is_reference"]`.'
        )
    of_reference = times(chosen_is_reference, wide(policy.chosen))
    of_reference += times(1 - chosen_is_reference, wide(policy.rejected))
    loss = -log_sigmoid(beta * (chosen - rejected)) + times(alpha, of_reference)
    return PairLoss(loss, beta * chosen, beta * rejected)
