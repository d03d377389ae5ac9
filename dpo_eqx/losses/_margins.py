"""`dpop`, `odpo`, `r_dpo`, `chi_po`: DPO with another margin.

The margin has a penalty, an offset, the lengths, or another link function.
"""

import jax.numpy as jnp
from jax.nn import log_sigmoid, relu

from .._arrays.log_probs import PairLogProbs
from .._arrays.loss_values import PairLoss
from ._checks import check_nonnegative, check_positive
from ._form import Scalar, lengths, log_ratios
from ._numerics import exponential, times


def dpop(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    penalty: Scalar = 50.0,
) -> PairLoss:
    r"""DPO-Positive: DPO that also keeps the chosen completion from becoming less likely.

    $\mathcal{L} = -\log\sigma(\beta[\rho_w - \rho_l - \mathrm{penalty}\cdot\max(0, -\rho_w)])$.

    At the corner, $\rho_w = 0$, the subgradient of the maximum is 0. If the policy starts at the
    reference, the first step is therefore the same as with DPO.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `penalty`: the paper's $\lambda$, not negative.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or a Python number is out of range.

    ??? cite

        Pal et al., *Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive*,
        2024 (arXiv 2402.13228).
    """
    check_positive(beta=beta)
    check_nonnegative(penalty=penalty)
    chosen, rejected = log_ratios(policy, reference, needed_by="dpop")
    margin = chosen - rejected - times(penalty, relu(-chosen))
    return PairLoss(-log_sigmoid(beta * margin), beta * chosen, beta * rejected)


def odpo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    offset: Scalar = 0.0,
) -> PairLoss:
    r"""DPO with an offset: requires a larger margin for a stronger preference.

    $\mathcal{L} = -\log\sigma(\beta(\rho_w - \rho_l) - \Delta)$. In the paper, $\Delta$ is a
    multiple of $\log(r_w - r_l)$, with rewards $r$ of the answers from a separate model.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `offset`: $\Delta$, usually one value per pair: in a step, `batch.per_pair["offset"]`. With 0
        it is DPO.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        Amini et al., *Direct Preference Optimization with an Offset*, 2024 (arXiv 2402.10571);
        the formula was checked against the authors' code.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="odpo")
    margin = beta * (chosen - rejected) - offset
    return PairLoss(-log_sigmoid(margin), beta * chosen, beta * rejected)


def r_dpo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    alpha: Scalar = 0.01,
) -> PairLoss:
    r"""Length-regularised DPO: the reward is penalised by `alpha` for each token.

    $\mathcal{L} = -\log\sigma(\beta(\rho_w - \rho_l) + \alpha(n_w - n_l))$. The sign is a plus,
    since a longer chosen completion shall be reinforced less.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats, and the policy's lengths in
        tokens. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `alpha`: $\alpha$, the penalty in units of reward per token.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` or the lengths are missing, or `beta` is not
    positive.

    ??? cite

        Park et al., *Disentangling Length from Quality in Direct Preference Optimization*, 2024
        (arXiv 2403.19159).
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="r_dpo")
    chosen_length, rejected_length = lengths(policy, needed_by="r_dpo")
    margin = beta * (chosen - rejected) + alpha * (chosen_length - rejected_length)
    return PairLoss(-log_sigmoid(margin), beta * chosen, beta * rejected)


def chi_po(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    clip: Scalar | None = None,
) -> PairLoss:
    r"""$\chi^2$ Preference Optimisation: DPO regularised by $\chi^2$, against over-optimisation.

    With $\phi = \rho + e^\rho$ and $\mathrm{clip}_c$, which clips to $[-c, c]$:
    $\mathcal{L} = -\log\sigma(\mathrm{clip}_c[\beta(\phi_w - \phi_l)])$. Past an exponent of 40
    (300 in float64) its tangent continues the exponential.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `clip`: $c$, which the paper sets to twice the largest reward. Past it the gradient is 0.
        `None` clips nothing. Positive.

    **Returns:**

    The unreduced loss and DPO's rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or a Python number is out of range.

    ??? cite

        Huang et al., *Correcting the Mythos of KL-Regularization: Direct Alignment without
        Overoptimization via Chi-Squared Preference Optimization*, 2024, algorithm 1 (arXiv
        2407.13399).
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="chi_po")
    z = beta * (chosen - rejected + exponential(chosen) - exponential(rejected))
    if clip is not None:
        check_positive(clip=clip)
        z = jnp.clip(z, -clip, clip)
    return PairLoss(-log_sigmoid(z), beta * chosen, beta * rejected)
