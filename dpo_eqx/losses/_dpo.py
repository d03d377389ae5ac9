"""Direct Preference Optimisation itself, and its two forms for noisy labels.

Other losses of the same difference are in `_difference.py`, and other margins in `_margins.py`.
"""

from jax.nn import log_sigmoid
from jaxtyping import Array, Float

from .._arrays.log_probs import PairLogProbs
from .._arrays.loss_values import PairLoss
from ._checks import check_positive, check_range
from ._divergences import Divergence, reverse_kl
from ._form import Scalar, log_ratios
from ._numerics import times


def dpo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    divergence: Divergence = reverse_kl,
) -> PairLoss:
    r"""Direct Preference Optimisation, with optional label smoothing (cDPO) and divergence (f-DPO).

    $\rho_w$ is the log-ratio $\log\pi(y_w) - \log\pi_{ref}(y_w)$ of the chosen completion $y_w$,
    and $\rho_l$ the log-ratio of the rejected completion $y_l$. With
    $z = \beta[s(\rho_w) - s(\rho_l)]$ and the score $s$ of the divergence, by default
    $s(\rho) = \rho$: $\mathcal{L} = -(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z)$.

    Differs from TRL 1.16, which ignores label smoothing here.

    **Arguments:**

    - `policy`, `reference`: log-probabilities of both completions, in nats, **summed** over
        completion tokens. Shape `(pairs,)`. No gradient flows into `reference`.
    - `beta`: strength of the pull towards the reference, in 1/nats; a number, a scalar or one
        value per pair. Positive.
    - `label_smoothing`: $\epsilon$, the assumed probability that a label is flipped, in
        `[0, 0.5)`.
    - `divergence`: $s$, such as `losses.jensen_shannon`; a function of the log-ratio.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or a Python number is out of range.

    ??? cite

        Rafailov et al., *Direct Preference Optimization: Your Language Model is Secretly a Reward
        Model*, 2023, equation 7 (arXiv 2305.18290). Smoothing: Mitchell, *A note on DPO with noisy
        preferences*, 2023, equation 3. Divergences: Wang et al., *Beyond Reverse KL*, 2023
        (arXiv 2309.16240).
    """
    check_positive(beta=beta)
    check_range(label_smoothing=label_smoothing, low=0, below=0.5)
    chosen, rejected = log_ratios(policy, reference, needed_by="dpo")
    z = beta * (divergence(chosen) - divergence(rejected))
    return PairLoss(smoothed(z, label_smoothing), beta * chosen, beta * rejected)


def robust_dpo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.1,
    divergence: Divergence = reverse_kl,
) -> PairLoss:
    r"""Robust DPO: an unbiased estimate of the loss on clean labels if some labels are flipped.

    With $z$ as in `dpo`:
    $\mathcal{L} = [-(1-\epsilon)\log\sigma(z) + \epsilon\log\sigma(-z)] / (1 - 2\epsilon)$. It is
    not bounded below.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `label_smoothing`: $\epsilon$, the probability that a label is flipped, in `[0, 0.5)`.
    - `divergence`: $s$, a function of the log-ratio.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or a Python number is out of range.

    ??? cite

        Chowdhury et al., *Provably Robust DPO: Aligning Language Models with Noisy Feedback*, 2024
        (arXiv 2403.00409).
    """
    check_positive(beta=beta)
    check_range(label_smoothing=label_smoothing, low=0, below=0.5)
    chosen, rejected = log_ratios(policy, reference, needed_by="robust_dpo")
    z = beta * (divergence(chosen) - divergence(rejected))
    biased = -(1 - label_smoothing) * log_sigmoid(z) + times(label_smoothing, log_sigmoid(-z))
    return PairLoss(biased / (1 - 2 * label_smoothing), beta * chosen, beta * rejected)


def smoothed(z: Float[Array, " pairs"], label_smoothing: Scalar) -> Float[Array, " pairs"]:
    r"""$-(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z)$."""
    # log_sigmoid(-z), not log(1 - sigmoid(z)), which is -inf from z = 17 on in float32.
    # `times`, since a rejected completion of probability 0 gives 0 * inf without smoothing.
    return -(1 - label_smoothing) * log_sigmoid(z) - times(label_smoothing, log_sigmoid(-z))
