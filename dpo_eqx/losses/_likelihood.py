"""`sft`, `simpo`, `alpha_po`, `cpo`, `orpo`: losses of the policy's likelihood alone.

They need no reference, and ignore a given one.
"""

from typing import overload

import jax.numpy as jnp
from jax.nn import log_sigmoid

from .._arrays.log_probs import PairLogProbs, UnpairedLogProbs
from .._arrays.loss_values import PairLoss, UnpairedLoss
from ._checks import check_nonnegative, check_positive
from ._divergences import alpha_divergence
from ._form import Scalar, average_of, averages
from ._numerics import log_1_minus_exp, times, wide


@overload
def sft(policy: PairLogProbs, reference: PairLogProbs | None) -> PairLoss: ...


@overload
def sft(policy: UnpairedLogProbs, reference: UnpairedLogProbs | None) -> UnpairedLoss: ...


def sft(
    policy: PairLogProbs | UnpairedLogProbs, reference: PairLogProbs | UnpairedLogProbs | None
) -> PairLoss | UnpairedLoss:
    r"""Supervised fine-tuning on the chosen completion: $\mathcal{L} = -\log\pi(y_w) / n_w$.

    On single completions, the desirable ones are chosen; an undesirable one has the loss 0.

    Averages over the tokens of each completion. Differs from TRL 1.16, which averages over the
    tokens of the microbatch, so that its loss depends on how the batch is split. If the weight of
    each completion is its number of tokens, as `data.batches(average="tokens")` makes it, the
    weighted mean is the mean over the tokens of the global batch.

    **Arguments:**

    - `policy`: summed log-probabilities, in nats, and lengths in tokens. Shape `(pairs,)`.
    - `reference`: ignored.

    **Returns:**

    The unreduced loss and, as rewards, the log-probabilities, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if the lengths are missing.
    """
    if isinstance(policy, UnpairedLogProbs):
        average = average_of(policy, needed_by="sft")
        return UnpairedLoss(jnp.where(policy.label, -average, 0), wide(policy.completion))
    chosen, _ = averages(policy, needed_by="sft")
    return PairLoss(-chosen, wide(policy.chosen), wide(policy.rejected))


def simpo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 2.0,
    gamma: Scalar = 1.0,
) -> PairLoss:
    r"""Simple Preference Optimisation.

    With the log-probability per token $\mathrm{avg} = \log\pi / n$:
    $\mathcal{L} = -\log\sigma(\beta(\mathrm{avg}_w - \mathrm{avg}_l) - \gamma)$.

    Differs from TRL 1.16, which adds a likelihood term unless `cpo_alpha=0`. The loss with this
    term is `combine((1, simpo), (1, sft))`.

    **Arguments:**

    - `policy`: summed log-probabilities, in nats, and lengths in tokens. Shape `(pairs,)`.
    - `reference`: ignored.
    - `beta`: scale of the rewards, in 1/nats. Positive.
    - `gamma`: the target margin of the rewards.

    **Returns:**

    The unreduced loss and the rewards $\beta\,\mathrm{avg}$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if the lengths are missing or `beta` is not positive.

    ??? cite

        Meng et al., *SimPO: Simple Preference Optimization with a Reference-Free Reward*, 2024
        (arXiv 2405.14734).
    """
    check_positive(beta=beta)
    chosen, rejected = averages(policy, needed_by="simpo")
    margin = beta * (chosen - rejected) - gamma
    return PairLoss(-log_sigmoid(margin), beta * chosen, beta * rejected)


def alpha_po(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 2.0,
    alpha: Scalar = 0.25,
    gamma: Scalar = 0.5,
) -> PairLoss:
    r"""AlphaPO: SimPO with a reward of another shape.

    With $\mathrm{avg} = \log\pi / n$ and the reward
    $r = \beta(1 - e^{-\alpha\,\mathrm{avg}})/\alpha$:
    $\mathcal{L} = -\log\sigma(r_w - r_l - \gamma)$. At $\alpha = 0$ it is SimPO. Past an exponent
    of 40 (300 in float64) its tangent continues the exponential.

    **Arguments:**

    - `policy`: summed log-probabilities, in nats, and lengths in tokens. Shape `(pairs,)`.
    - `reference`: ignored.
    - `beta`: scale of the rewards, in 1/nats. Positive.
    - `alpha`: the shape of the reward, any number.
    - `gamma`: the target margin of the rewards.

    **Returns:**

    The unreduced loss and the rewards $r$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if the lengths are missing or `beta` is not positive.

    ??? cite

        Gupta et al., *AlphaPO: Reward Shape Matters for LLM Alignment*, 2025 (arXiv 2501.03884).
    """
    check_positive(beta=beta)
    shape = alpha_divergence(alpha)
    chosen, rejected = (shape(average) for average in averages(policy, needed_by="alpha_po"))
    margin = beta * (chosen - rejected) - gamma
    return PairLoss(-log_sigmoid(margin), beta * chosen, beta * rejected)


def cpo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    alpha: Scalar = 1.0,
) -> PairLoss:
    r"""Contrastive Preference Optimisation: DPO with a uniform reference, and a likelihood term.

    $\mathcal{L} = -\log\sigma(\beta(\log\pi(y_w) - \log\pi(y_l))) - \alpha\log\pi(y_w) / n_w$.

    **Arguments:**

    - `policy`: summed log-probabilities, in nats, and lengths in tokens. Shape `(pairs,)`.
    - `reference`: ignored.
    - `beta`: scale of the rewards, in 1/nats. Positive.
    - `alpha`: weight of the likelihood term, not negative.

    **Returns:**

    The unreduced loss and the rewards $\beta\log\pi$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if the lengths are missing or a Python number is out of range.

    ??? cite

        Xu et al., *Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance
        in Machine Translation*, 2024, equation 3 (arXiv 2401.08417).
    """
    check_positive(beta=beta)
    check_nonnegative(alpha=alpha)
    average, _ = averages(policy, needed_by="cpo")
    chosen, rejected = wide(policy.chosen), wide(policy.rejected)
    loss = -log_sigmoid(beta * (chosen - rejected)) - times(alpha, average)
    return PairLoss(loss, beta * chosen, beta * rejected)


def orpo(policy: PairLogProbs, reference: PairLogProbs | None, *, beta: Scalar = 0.1) -> PairLoss:
    r"""Odds Ratio Preference Optimisation.

    With $\mathrm{avg} = \log\pi / n$ and the log-odds
    $o = \mathrm{avg} - \log(1 - e^{\mathrm{avg}})$:
    $\mathcal{L} = -\mathrm{avg}_w - \beta\log\sigma(o_w - o_l)$.

    An empty completion, or one whose average probability rounds to 1, has infinite odds. In the
    odds, $\mathrm{avg}$ is therefore at most minus the machine epsilon. If it is larger, no
    gradient flows through the odds.

    **Arguments:**

    - `policy`: summed log-probabilities, in nats, and lengths in tokens. Shape `(pairs,)`.
    - `reference`: ignored.
    - `beta`: weight of the odds ratio (the paper's $\lambda$). Positive.

    **Returns:**

    The unreduced loss and the rewards $\beta\,\mathrm{avg}$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if the lengths are missing or `beta` is not positive.

    ??? cite

        Hong et al., *ORPO: Monolithic Preference Optimization without Reference Model*, 2024,
        equations 4 and 7 (arXiv 2403.07691).
    """
    check_positive(beta=beta)
    chosen, rejected = averages(policy, needed_by="orpo")
    largest = -float(jnp.finfo(chosen.dtype).eps)
    capped = [jnp.minimum(average, largest) for average in (chosen, rejected)]
    # Not log1p(-exp(average)), which loses every digit near 0 and has a NaN gradient at 0.
    chosen_odds, rejected_odds = (average - log_1_minus_exp(average) for average in capped)
    loss = -chosen - beta * log_sigmoid(chosen_odds - rejected_odds)
    return PairLoss(loss, beta * chosen, beta * rejected)
