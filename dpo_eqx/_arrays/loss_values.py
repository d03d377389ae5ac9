"""The results of losses: one value for each pair, in their order, and the implicit rewards.

The losses themselves are in `dpo_eqx.losses`.
"""

import equinox as eqx
from jaxtyping import Array, Float

from .log_probs import check_one_shape


class PairLoss(eqx.Module):
    """The result of a loss, not reduced: one value for each pair, in their order.

    **Arguments:**

    - `loss`: the loss of each pair. Shape `(pairs,)`.
    - `chosen_reward`, `rejected_reward`: the algorithm's implicit rewards, `beta` included.
        Shape `(pairs,)`.
    """

    loss: Float[Array, " pairs"]
    chosen_reward: Float[Array, " pairs"]
    rejected_reward: Float[Array, " pairs"]

    def __check_init__(self):
        check_one_shape(self, "loss")


class UnpairedLoss(eqx.Module):
    """The result of a loss on unpaired completions, not reduced and in their order.

    **Arguments:**

    - `loss`: the loss of each completion. Shape `(pairs,)`.
    - `reward`: the implicit reward of each completion, `beta` included. Shape `(pairs,)`.
    """

    loss: Float[Array, " pairs"]
    reward: Float[Array, " pairs"]

    def __check_init__(self):
        check_one_shape(self, "loss")
