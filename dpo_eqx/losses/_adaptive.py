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

    $\mathcal{L} = -\log\sigma(\beta_b(\rho_w - \rho_l))$ with the $\beta$ of the batch,
    $\beta_b = \max(\beta[1 + \alpha(M - M_0)], 10^{-3})$. $M$ is the weighted mean of
    $\beta(\rho_w - \rho_l)$ over the global batch, and $M_0$ the running margin. No gradient flows
    into the policy through $\beta_b$.

    Couples pairs. The paper's filter, which draws at random the pairs to train on, is left out: it
    selects data, and `weight` can express it. Differs from the authors' code, whose $M$ is the
    mean of $\rho_w - \rho_l$ without $\beta$: `alpha` in their code is `alpha * beta` here. The
    floor of $10^{-3}$ is from their code and does not scale with `beta`: keep `beta` well above it.

    **Arguments:**

    - `policy`, `reference`: summed log-probabilities, in nats. Shape `(pairs,)`.
    - `beta`: $\beta$ at the running margin, in 1/nats. Positive.
    - `alpha`: how strongly $\beta_b$ follows the margin.
    - `margin`: $M_0$, a reward. The caller carries it, see `update_margin`.

    **Returns:**

    The unreduced loss and the rewards $\beta\rho$ (with $\beta$, not $\beta_b$), each of shape
    `(pairs,)`. The mean of their margins is $M$.

    **Raises:**

    `ValueError` at trace time if `reference` is missing or `beta` is not positive.

    ??? cite

        Wu et al., *$\beta$-DPO: Direct Preference Optimization with Dynamic $\beta$*, 2024 (arXiv
        2407.08639). Floor and decay are those of the authors' code.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(policy, reference, needed_by="beta_dpo")
    apart = chosen - rejected
    batch_margin = weighted_mean(beta * jax.lax.stop_gradient(apart), policy.weight)
    batch_beta = beta * (1 + times(alpha, batch_margin - margin))
    # With one infinite margin, every pair's slope would otherwise be 0 * inf.
    batch_beta = jnp.clip(batch_beta, 1e-3, square_limit(batch_beta.dtype))
    return PairLoss(-log_sigmoid(batch_beta * apart), beta * chosen, beta * rejected)


def update_margin(margin: Scalar, batch_margin: Scalar, *, decay: Scalar = 0.9) -> Scalar:
    r"""The running margin of `beta_dpo` after a batch: $d M_0 + (1 - d) M$.

    The loop carries this value, like the optimiser's state. Pass it as an array, so that no step
    recompiles:

    ```python
    grad = dpx.make_grad(partial(losses.beta_dpo, margin=margin))
    gradients, metrics = grad(policy, batch, reference)
    margin = losses.update_margin(margin, metrics["rewards/margins"])
    ```

    The authors' code updates the margin before it uses it. Updating it afterwards needs no second
    forward pass of the policy.

    **Arguments:**

    - `margin`: $M_0$ before the batch, a reward.
    - `batch_margin`: $M$, the mean reward margin of the batch: `metrics["rewards/margins"]`.
    - `decay`: $d$, in `[0, 1)`.

    **Returns:**

    $M_0$ after the batch, a scalar.

    **Raises:**

    `ValueError` at trace time if `decay` is out of range.
    """
    check_range(decay=decay, low=0, below=1)
    return decay * margin + (1 - decay) * batch_margin
