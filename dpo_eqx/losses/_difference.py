r"""`hinge`, `ipo`, `exo`, `discopop`: losses of the difference $s(\rho_w) - s(\rho_l)$.

As in `dpo`, the partition function cancels in these losses, so they take any divergence.
"""

import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid

from .._arrays.log_probs import PairLogProbs
from .._arrays.loss_values import PairLoss
from ._checks import check_between, check_positive
from ._divergences import Divergence, reverse_kl
from ._form import Scalar, log_ratios
from ._numerics import exponential, square, times


def hinge(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    divergence: Divergence = reverse_kl,
) -> PairLoss:
    r"""The hinge loss of SLiC-HF on DPO's rewards: $\mathcal{L} = \max(0, 1 - z)$.

    $z = \beta[s(\rho_w) - s(\rho_l)]$. At the corner, $z = 1$, the subgradient is 0.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. The loss is 0 from a margin of
        `1 / beta` on. Positive.
    - `divergence`: $s$, a function of the log-ratio.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        Zhao et al., *SLiC-HF: Sequence Likelihood Calibration with Human Feedback*, 2023 (arXiv
        2305.10425); with DPO's rewards: Liu et al., *Statistical Rejection Sampling Improves
        Preference Optimization*, 2023 (arXiv 2309.06657).
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="hinge")
    z = beta * (divergence(chosen) - divergence(rejected))
    return PairLoss(relu(1 - z), beta * chosen, beta * rejected)


def ipo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    divergence: Divergence = reverse_kl,
) -> PairLoss:
    r"""Identity Preference Optimisation: regresses the margin to $1/(2\beta)$.

    $\mathcal{L} = [s(\rho_w) - s(\rho_l) - 1/(2\beta)]^2$, on **sums** over tokens, as in the paper
    and the original implementation. TRL's `"ipo"` averages over tokens, which the authors confirmed
    to have used. That loss is `length_normalized(ipo)`, and `BY_NAME["ipo"]`.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: the paper's $\tau$, in 1/nats. Positive.
    - `divergence`: $s$, a function of the log-ratio.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        Azar et al., *A General Theoretical Paradigm to Understand Learning from Human
        Preferences*, 2023, equation 17 (arXiv 2310.12036).
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="ipo")
    margin = divergence(chosen) - divergence(rejected)
    return PairLoss(square(margin - 1 / (2 * beta)), beta * chosen, beta * rejected)


def exo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 1e-3,
    divergence: Divergence = reverse_kl,
) -> PairLoss:
    r"""Efficient Exact Optimisation on pairs: the reverse KL from the policy's preference.

    With $z = \beta[s(\rho_w) - s(\rho_l)]$: $\mathcal{L} =
    \sigma(z)[\log\sigma(z) - \log(1-\epsilon)] + \sigma(-z)[\log\sigma(-z) - \log\epsilon]$.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `label_smoothing`: $\epsilon$, the target probability of the rejected completion, in
        `(0, 0.5)`. At 0 the loss would be infinite.
    - `divergence`: $s$, a function of the log-ratio.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or a Python number is out of range.

    ??? cite

        Ji et al., *Towards Efficient Exact Optimization of Language Model Alignment*, 2024,
        equation 16 (arXiv 2402.00856).
    """
    check_positive(beta=beta)
    check_between(label_smoothing=label_smoothing, above=0, below=0.5)
    chosen, rejected = log_ratios(policy, reference, needed_by="exo")
    z = beta * (divergence(chosen) - divergence(rejected))
    # At an infinite z, one term would be 0 * inf. Both terms are constant long before that.
    z = jnp.clip(z, -1000, 1000)
    loss = sigmoid(z) * (log_sigmoid(z) - jnp.log1p(-label_smoothing))
    loss += sigmoid(-z) * (log_sigmoid(-z) - jnp.log(label_smoothing))
    return PairLoss(loss, beta * chosen, beta * rejected)


def discopop(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    tau: Scalar = 0.05,
    divergence: Divergence = reverse_kl,
) -> PairLoss:
    r"""Discovered Preference Optimisation, the log-ratio modulated loss.

    With $z = \beta[s(\rho_w) - s(\rho_l)]$:
    $\mathcal{L} = -\sigma(-z/\tau)\log\sigma(z) + \sigma(z/\tau) e^{-z}$.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `tau`: $\tau$, width of the transition from the logistic to the exponential loss. Positive.
    - `divergence`: $s$, a function of the log-ratio.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or a Python number is out of range.

    ??? cite

        Lu et al., *Discovering Preference Optimization Algorithms with and for Large Language
        Models*, 2024, equation 5 (arXiv 2406.08414).
    """
    check_positive(beta=beta, tau=tau)
    chosen, rejected = log_ratios(policy, reference, needed_by="discopop")
    z = beta * (divergence(chosen) - divergence(rejected))
    # exp(log sigmoid(z / tau) - z), not sigmoid(z / tau) * exp(-z), which is 0 * inf from z = -89
    # on in float32. At z = -inf, log sigmoid(z / tau) is z / tau, since its difference with z would
    # be inf - inf.
    lowest = z == -jnp.inf
    inside = jnp.where(lowest, 0, z)
    exponent = jnp.where(lowest, times(1 / tau - 1, z), log_sigmoid(inside / tau) - inside)
    # The product below is 0 at both ends, where its factors are 0 and inf. Clipping z changes
    # nothing, since the product is constant long before.
    end = 1000 * jnp.maximum(tau, 1)
    middle = jnp.clip(z, -end, end)
    crossover = sigmoid(middle / tau) * log_sigmoid(middle)
    loss = exponential(exponent) + crossover - log_sigmoid(z)
    return PairLoss(loss, beta * chosen, beta * rejected)
