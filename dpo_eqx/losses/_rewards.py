r"""`bradley_terry`: the loss of a reward model, which scores completions and has no reference.

In place of log-probabilities it takes rewards, from a score such as `models.score_rewards`.
"""

from .._arrays.log_probs import PairLogProbs
from .._arrays.loss_values import PairLoss
from ._checks import check_nonnegative, check_range
from ._dpo import smoothed
from ._form import Scalar
from ._numerics import difference, square, times, wide


def bradley_terry(
    policy: PairLogProbs,
    reference: PairLogProbs | None = None,
    *,
    margin: Scalar = 0.0,
    label_smoothing: Scalar = 0.0,
    centering: Scalar = 0.0,
) -> PairLoss:
    r"""The Bradley-Terry loss of a reward model.

    With rewards $r_w$ and $r_l$ of the chosen and the rejected completion and $z = r_w - r_l - m$:
    $\mathcal{L} = -(1-\epsilon)\log\sigma(z) - \epsilon\log\sigma(-z) + c (r_w + r_l)^2$.

    ```python
    step = dpx.make_step(losses.bradley_terry, optimizer, score=models.score_rewards)
    ```

    **Arguments:**

    - `policy`: the rewards, in the fields `chosen` and `rejected`. Shape `(pairs,)`.
    - `reference`: ignored.
    - `margin`: $m$, by how much the rewards should differ at least; in a step
        `batch.per_pair["margin"]` gives one value per pair.
    - `label_smoothing`: $\epsilon$, the assumed probability that a label is flipped, in
        `[0, 0.5)`.
    - `centering`: $c$, the strength that keeps the rewards of a pair near a mean of 0, which the
        preferences leave open. Not negative.

    **Returns:**

    The unreduced loss and the rewards themselves, each of shape `(pairs,)`.

    **Raises:**

    `ValueError` at trace time if a Python number is out of range.

    ??? cite

        Bradley and Terry, *Rank Analysis of Incomplete Block Designs*, 1952. Margin: Touvron et
        al., *Llama 2*, 2023, equation 2 (arXiv 2307.09288). Centering: Eisenstein et al., *Helping
        or Herding?*, 2023 (arXiv 2312.09244).
    """
    check_range(label_smoothing=label_smoothing, low=0, below=0.5)
    check_nonnegative(centering=centering)
    chosen, rejected = wide(policy.chosen), wide(policy.rejected)
    loss = smoothed(difference(chosen, rejected) - margin, label_smoothing)
    return PairLoss(loss + times(centering, square(chosen + rejected)), chosen, rejected)
