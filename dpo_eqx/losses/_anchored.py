"""`nca`, `bco_pair`, `sppo`, `cal_dpo`, `apo_zero`, `apo_down`: each completion has its anchor.

The partition function does not cancel in these losses, so they take no divergence.
"""

import jax
from jax.nn import log_sigmoid, sigmoid

from .._arrays.log_probs import PairLogProbs
from .._arrays.loss_values import PairLoss
from ._checks import check_positive
from ._form import Scalar, log_ratios
from ._numerics import square


def nca(policy: PairLogProbs, reference: PairLogProbs | None, *, beta: Scalar = 0.1) -> PairLoss:
    r"""Noise Contrastive Alignment, for pairs.

    $\mathcal{L} = -\log\sigma(\beta\rho_w) - \frac12\log\sigma(-\beta\rho_w)
    - \frac12\log\sigma(-\beta\rho_l)$.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        Chen et al., *Noise Contrastive Alignment of Language Models with Explicit Rewards*, 2024
        (arXiv 2402.05369).
    """
    check_positive(beta=beta)
    chosen, rejected = (beta * rho for rho in log_ratios(policy, reference, needed_by="nca"))
    loss = -log_sigmoid(chosen) - log_sigmoid(-chosen) / 2 - log_sigmoid(-rejected) / 2
    return PairLoss(loss, chosen, rejected)


def bco_pair(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    delta: Scalar = 0.0,
) -> PairLoss:
    r"""Binary Classifier Optimisation, on pairs.

    $\mathcal{L} = -\log\sigma(\beta\rho_w - \delta) - \log\sigma(-(\beta\rho_l - \delta))$.

    Differs from TRL 1.16, whose $\delta$ is 0. In the paper, $\delta$ is a running mean of the
    rewards: carry it with `update_delta`, or use the mean of the batch by `batch_delta(bco_pair)`.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `delta`: $\delta$, the reward that separates good from bad. No gradient flows into it.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$ (not shifted), each of shape
    `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        Jung et al., *Binary Classifier Optimization for Large Language Model Alignment*, 2024
        (arXiv 2404.04656).
    """
    check_positive(beta=beta)
    chosen, rejected = (beta * rho for rho in log_ratios(policy, reference, needed_by="bco_pair"))
    delta = jax.lax.stop_gradient(delta)
    loss = -log_sigmoid(chosen - delta) - log_sigmoid(delta - rejected)
    return PairLoss(loss, chosen, rejected)


def sppo(policy: PairLogProbs, reference: PairLogProbs | None, *, beta: Scalar = 0.1) -> PairLoss:
    r"""Self-Play Preference Optimisation with hard labels: regresses to win rates of 1 and 0.

    $\mathcal{L} = [\rho_w - 1/(2\beta)]^2 + [\rho_l + 1/(2\beta)]^2$.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: one over the paper's $\eta$, in 1/nats. Positive.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        Wu et al., *Self-Play Preference Optimization for Language Model Alignment*, 2024,
        equation 4.7 with preferences of 1 and 0 (arXiv 2405.00675).
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="sppo")
    target = 1 / (2 * beta)
    loss = square(chosen - target) + square(rejected + target)
    return PairLoss(loss, beta * chosen, beta * rejected)


def cal_dpo(
    policy: PairLogProbs, reference: PairLogProbs | None, *, beta: Scalar = 0.1
) -> PairLoss:
    r"""Calibrated DPO: DPO with each log-ratio also regressed to $\pm 1/(2\beta)$.

    $\mathcal{L} = -\log\sigma(\rho_w - \rho_l) + [\rho_w - 1/(2\beta)]^2
    + [\rho_l + 1/(2\beta)]^2$, with no $\beta$ in the first term.

    Differs from the authors' code, which halves the two squares. This function follows the paper.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: one over the distance between the two targets, in 1/nats. Positive.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        Xiao et al., *Cal-DPO: Calibrated Direct Preference Optimization for Language Model
        Alignment*, 2024, algorithm 1 (arXiv 2412.14516).
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="cal_dpo")
    target = 1 / (2 * beta)
    calibration = square(chosen - target) + square(rejected + target)
    loss = calibration - log_sigmoid(chosen - rejected)
    return PairLoss(loss, beta * chosen, beta * rejected)


def apo_zero(
    policy: PairLogProbs, reference: PairLogProbs | None, *, beta: Scalar = 0.1
) -> PairLoss:
    r"""Anchored Preference Optimisation for chosen completions that are better than the policy's.

    $\mathcal{L} = 1 - \sigma(\beta\rho_w) + \sigma(\beta\rho_l)$: the chosen becomes more likely,
    the rejected less likely.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        D'Oosterlinck et al., *Anchored Preference Optimization and Contrastive Revisions*, 2024,
        equation 7 (arXiv 2408.06266).
    """
    check_positive(beta=beta)
    chosen, rejected = (beta * rho for rho in log_ratios(policy, reference, needed_by="apo_zero"))
    return PairLoss(sigmoid(-chosen) + sigmoid(rejected), chosen, rejected)


def apo_down(
    policy: PairLogProbs, reference: PairLogProbs | None, *, beta: Scalar = 0.1
) -> PairLoss:
    r"""Anchored Preference Optimisation for chosen completions that are worse than the policy's.

    $\mathcal{L} = \sigma(\beta\rho_w) + 1 - \sigma(\beta(\rho_w - \rho_l))$: both completions
    become less likely, above all the rejected one.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        D'Oosterlinck et al., *Anchored Preference Optimization and Contrastive Revisions*, 2024,
        equation 8 (arXiv 2408.06266).
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="apo_down")
    loss = sigmoid(beta * chosen) + sigmoid(beta * (rejected - chosen))
    return PairLoss(loss, beta * chosen, beta * rejected)
