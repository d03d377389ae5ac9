"""The records of log-probabilities that a score returns and a loss takes.

Nothing here depends on policies or losses. `_head` computes log-probabilities from logits or from
hidden states.
"""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from .._jax.scalars import Weights


class TokenValues(eqx.Module):
    r"""Values of the single tokens of a completion, for metrics; no gradient flows through them.

    All have shape `(pairs, completion)`. A field is `None` if the score was not asked for it.

    **Arguments:**

    - `mask`: true at the scored tokens. The values at other positions have no meaning.
    - `log_probs`: the log-probability of each token, in nats.
    - `entropy`: the entropy of the distribution that predicts the token, in nats.
    - `correct`: 1 if no token has a higher logit than this one, else 0.
    - `mean_logit`: the mean of the logits over the vocabulary.
    """

    mask: Bool[Array | np.ndarray, "pairs completion"]
    log_probs: Float[Array | np.ndarray, "pairs completion"]
    entropy: Float[Array | np.ndarray, "pairs completion"] | None = None
    correct: Float[Array | np.ndarray, "pairs completion"] | None = None
    mean_logit: Float[Array | np.ndarray, "pairs completion"] | None = None


class PairLogProbs(eqx.Module):
    """Log-probabilities of the chosen and the rejected completion of each pair.

    They are in nats, and **summed** over the scored tokens, never averaged. The number of scored
    tokens is a separate field, from which a loss can compute the average.

    **Arguments:**

    - `chosen`, `rejected`: $\\log\\pi(y_w | x)$ and $\\log\\pi(y_l | x)$. Shape `(pairs,)`.
    - `chosen_length`, `rejected_length`: the number of scored tokens. Shape `(pairs,)`.
    - `weight`: the batch's weight of each pair, copied by the score. Shape `(pairs,)`.
    - `chosen_confidence`, `rejected_confidence`: for `losses.wpo`, if they were requested.
        Shape `(pairs,)`.
    - `chosen_tokens`, `rejected_tokens`: values of single tokens, if `metrics` of the score asked
        for them.
    """

    chosen: Float[Array | np.ndarray, " pairs"]
    rejected: Float[Array | np.ndarray, " pairs"]
    chosen_length: Integer[Array | np.ndarray, " pairs"] | None = None
    rejected_length: Integer[Array | np.ndarray, " pairs"] | None = None
    weight: Weights | None = None
    chosen_confidence: Float[Array | np.ndarray, " pairs"] | None = None
    rejected_confidence: Float[Array | np.ndarray, " pairs"] | None = None
    chosen_tokens: TokenValues | None = None
    rejected_tokens: TokenValues | None = None

    def __check_init__(self):
        check_one_shape(self, "chosen")


class UnpairedLogProbs(eqx.Module):
    """Log-probabilities of single completions with a label, for KTO and its relatives.

    **Arguments:**

    - `completion`: $\\log\\pi(y | x)$, summed, nats. Shape `(pairs,)`.
    - `label`: true if the completion is desirable. Shape `(pairs,)`.
    - `kl`: $\\log\\pi(y' | x)$ of a completion $y'$ drawn for another prompt, from which KTO
        estimates its reference point. Shape `(pairs,)`.
    - `length`: the number of scored tokens of `completion`. Shape `(pairs,)`.
    - `weight`: the batch's weight of each row, copied by the score. Shape `(pairs,)`.
    - `tokens`: values of the single tokens of `completion`, if `metrics` of the score asked for
        them.
    """

    completion: Float[Array | np.ndarray, " pairs"]
    label: Bool[Array | np.ndarray, " pairs"]
    kl: Float[Array | np.ndarray, " pairs"] | None = None
    length: Integer[Array | np.ndarray, " pairs"] | None = None
    weight: Weights | None = None
    tokens: TokenValues | None = None

    def __check_init__(self):
        check_one_shape(self, "completion")
        if hasattr(self.label, "dtype") and self.label.dtype != bool:
            raise ValueError(
                f"`label` must be boolean (true if the completion is desirable); got "
                f"{self.label.dtype}. Convert it, for instance by `label > 0`."
            )


def check_one_shape(record: eqx.Module, first: str) -> None:
    """Raises if the arrays of `record` do not all have the shape of its field `first`."""
    # An optional field is `None`, which has no shape.
    shapes = {name: x.shape for name, x in vars(record).items() if hasattr(x, "shape")}
    for name, shape in shapes.items():
        if shape == shapes.get(first, shape):
            continue
        # If the first field is a mean, it is at fault, rather than all others.
        wrong, right = (first, name) if shapes[first] == () else (name, first)
        raise ValueError(
            f"`{wrong}` must have one value per pair, the shape of `{right}`, {shapes[right]}; "
            f"got {shapes[wrong]}."
        )
