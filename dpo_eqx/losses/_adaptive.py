"""DPO whose `beta` follows the batch, and the running margin that the caller carries for it."""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from .._arrays.log_probs import PairLogProbs
from .._arrays.loss_values import PairLoss
from ._checks import check_positive, check_range
from ._form import Scalar, log_ratios
from ._marks import couples_pairs
from ._numerics import square_limit, times, weighted_mean


@couples_pairs
def beta_dpo(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    *,
    beta: Scalar = 0.1,
    alpha: Scalar = 0.6,
    margin: Scalar = 0.0,
) -> PairLoss:
    r"""$\beta$-DPO: a batch of wide margins is held closer to the reference.

    With $M$ the weighted mean of $\beta(\rho_w - \rho_l)$ over the global batch, and $M_0$ the
    running margin: $\beta_b = \max(\beta[1 + \alpha(M - M_0)], 10^{-3})$ and
    $\ell = -\log\sigma(\beta_b(\rho_w - \rho_l))$. No gradient flows into the policy through
    $\beta_b$.

    Couples pairs. The paper's filter, which draws the pairs that take part at random, is left out:
    it is a choice of data, and `weight` can hold it. Differs from the authors' code, whose $M$ is
    the mean of $\rho_w - \rho_l$ without $\beta$: there `alpha` is ours times `beta`. The floor is
    theirs, an absolute one: keep `beta` well above it.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: $\beta$ at the running margin, in 1/nats. Positive.
    - `alpha`: how strongly $\beta_b$ follows the margin.
    - `margin`: $M_0$, a reward; carried by the caller, see `update_margin`.

    **Returns:**

    The unreduced loss and the rewards $\beta\rho$ (of `beta`, not of $\beta_b$), each of shape
    `(pairs,)`; their mean margin is $M$.

    **Raises:**

    `ValueError` at trace time where `reference` is missing or `beta` is not positive.

    ??? cite

        Wu et al., *$\beta$-DPO: Direct Preference Optimization with Dynamic $\beta$*, 2024 (arXiv
        2407.08639). Floor and decay are those of the authors' code.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="beta_dpo")
    apart = chosen - rejected
    batch_margin = weighted_mean(beta * jax.lax.stop_gradient(apart), policy.weight)
    batch_beta = beta * (1 + times(alpha, batch_margin - margin))
    # One infinite margin would otherwise make 0 * inf of every pair's slope.
    batch_beta = jnp.clip(batch_beta, 1e-3, square_limit(batch_beta.dtype))
    return PairLoss(-log_sigmoid(batch_beta * apart), beta * chosen, beta * rejected)


def update_margin(margin: Scalar, batch_margin: Scalar, *, decay: Scalar = 0.9) -> Scalar:
    r"""The running margin of `beta_dpo` after a batch: $m M_0 + (1 - m) M$.

    It is a value that the loop carries, like the optimiser's state; pass it as an array, so that
    no step recompiles:

    ```python
    grad = dpx.make_grad(partial(losses.beta_dpo, margin=margin))
    gradients, metrics = grad(policy, batch, reference)
    margin = losses.update_margin(margin, metrics["rewards/margins"])
    ```

    The authors' code updates before it uses the margin; this order, the other way round, needs no
    second pass over the policy.

    **Arguments:**

    - `margin`: $M_0$ before, a reward.
    - `batch_margin`: $M$, the mean reward margin of the batch: `metrics["rewards/margins"]`.
    - `decay`: $m$, in `[0, 1)`.

    **Returns:**

    $M_0$ after, a scalar.

    **Raises:**

    `ValueError` at trace time where `decay` is out of range.
    """
    check_range(decay=decay, low=0, below=1)
    return decay * margin + (1 - decay) * batch_margin
