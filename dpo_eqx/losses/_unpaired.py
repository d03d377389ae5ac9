"""`kto`, `apo_zero_unpaired`, `bco`: losses on single completions, labelled desirable or not."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid, relu, sigmoid
from jaxtyping import Array, Bool, Float

from .._arrays.log_probs import UnpairedLogProbs
from .._arrays.loss_values import UnpairedLoss
from ._checks import check_nonnegative, check_positive
from ._form import Scalar, log_ratio, require_reference
from ._marks import couples_pairs
from ._numerics import difference, weighted_mean, wide


@couples_pairs
def kto(
    policy: UnpairedLogProbs,
    reference: UnpairedLogProbs | None,
    *,
    beta: Scalar = 0.1,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> UnpairedLoss:
    r"""Kahneman-Tversky Optimisation.

    $\mathcal{L} = \lambda_D[1 - \sigma(\beta(\rho - \rho_0))]$ for a desirable completion, and
    $\lambda_U[1 - \sigma(\beta(\rho_0 - \rho))]$ for an undesirable one. The reference point
    $\rho_0$ (the paper's $z_0$) is $\max(0, \text{weighted mean of } \rho_{kl})$ over the global
    batch. No gradient flows through it.

    Couples pairs, through $\rho_0$. Rows of weight 0 do not count in it.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats, of the completions and, as `kl`, of
        completions drawn for other prompts. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `desirable_weight`, `undesirable_weight`: $\lambda_D$ and $\lambda_U$, not negative.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` or `kl` is missing or a Python number is out of
    range.

    ??? cite

        Ethayarajh et al., *KTO: Model Alignment as Prospect Theoretic Optimization*, 2024,
        equation 7 (arXiv 2402.01306).
    """
    check_positive(beta=beta)
    check_nonnegative(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    rho = log_ratio(policy, reference, needed_by="kto")
    point = relu(weighted_mean(_kl_log_ratio(policy, reference), policy.weight))
    value = sigmoid(-_towards_good(beta * (rho - point), policy.label))
    weight = jnp.where(policy.label, desirable_weight, undesirable_weight)
    return UnpairedLoss(weight * value, beta * rho)


def apo_zero_unpaired(
    policy: UnpairedLogProbs, reference: UnpairedLogProbs | None, *, beta: Scalar = 0.1
) -> UnpairedLoss:
    r"""`apo_zero` on single completions: KTO with its reference point at 0.

    $\mathcal{L} = 1 - \sigma(\beta\rho)$ for a desirable completion, and $\sigma(\beta\rho)$ for an
    undesirable one.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.

    **Returns:**

    The unreduced loss and the implicit rewards $\beta\rho$, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        D'Oosterlinck et al., *Anchored Preference Optimization and Contrastive Revisions*, 2024,
        equation 7, unpaired (arXiv 2408.06266).
    """
    check_positive(beta=beta)
    reward = beta * log_ratio(policy, reference, needed_by="apo_zero_unpaired")
    return UnpairedLoss(sigmoid(-_towards_good(reward, policy.label)), reward)


def bco(
    policy: UnpairedLogProbs,
    reference: UnpairedLogProbs | None,
    *,
    beta: Scalar = 0.1,
    delta: Scalar = 0.0,
) -> UnpairedLoss:
    r"""Binary Classifier Optimisation: the reward is the logit of "desirable".

    $\mathcal{L} = -\log\sigma(\beta\rho - \delta)$ for a desirable completion, and
    $-\log\sigma(-(\beta\rho - \delta))$ for an undesirable one.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: strength of the pull towards the reference, in 1/nats. Positive.
    - `delta`: $\delta$, the reward that separates good from bad. Carry it with `update_delta`, or
        use the mean of the batch by `batch_delta(bco)`. No gradient flows into it.

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
    reward = beta * log_ratio(policy, reference, needed_by="bco")
    shifted = reward - jax.lax.stop_gradient(delta)
    return UnpairedLoss(-log_sigmoid(_towards_good(shifted, policy.label)), reward)


def _towards_good(
    x: Float[Array, " pairs"], label: Bool[Array | np.ndarray, " pairs"]
) -> Float[Array, " pairs"]:
    """`x` if the completion is desirable, `-x` if it is not."""
    return jnp.where(label, x, -x)


def _kl_log_ratio(
    policy: UnpairedLogProbs, reference: UnpairedLogProbs | None
) -> Float[Array, " pairs"]:
    reference = require_reference(reference, needed_by="kto")
    values = []
    for name, log_probs in {"policy": policy, "reference": reference}.items():
        if log_probs.kl is None:
            raise ValueError(
                f"`kto` needs `{name}.kl`, the log-probabilities of completions drawn for other "
                "prompts, and got none. Give the batch such completions: `UnpairedBatch(kl=...)`."
            )
        values.append(wide(log_probs.kl))
    return jax.lax.stop_gradient(difference(*values))
