"""The records of log-probabilities that a score returns and a loss takes.

Nothing here depends on policies or losses. `_head` computes log-probabilities from logits or from
hidden states.
"""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from .._jax.scalars import Weights


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
    """

    chosen: Float[Array | np.ndarray, " pairs"]
    rejected: Float[Array | np.ndarray, " pairs"]
    chosen_length: Integer[Array | np.ndarray, " pairs"] | None = None
    rejected_length: Integer[Array | np.ndarray, " pairs"] | None = None
    weight: Weights | None = None
    chosen_confidence: Float[Array | np.ndarray, " pairs"] | None = None
    rejected_confidence: Float[Array | np.ndarray, " pairs"] | None = None

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
    """

    completion: Float[Array | np.ndarray, " pairs"]
    label: Bool[Array | np.ndarray, " pairs"]
    kl: Float[Array | np.ndarray, " pairs"] | None = None
    length: Integer[Array | np.ndarray, " pairs"] | None = None
    weight: Weights | None = None

    def __check_init__(self):
        check_one_shape(self, "completion")
        if hasattr(self.label, "dtype") and self.label.dtype != bool:
            raise ValueError(
                f"`label` must be boolean (true if the completion is desirable); got "
                f"{self.label.dtype}. Convert it, for instance by `label > 0`."
            )


def check_one_shape(record: eqx.Module, first: str) -> None:
    """Raises if the arrays of `record` do not all have the shape of its field `first`."""
    want = getattr(getattr(record, first), "shape", None)
    for name, value in vars(record).items():
        # An optional field is `None`, which has no shape.
        shape = getattr(value, "shape", want)
        if shape != want:
            raise ValueError(
                f"`{name}` must have the shape of `{first}`, {want}, one value per pair; "
                f"got {shape}."
            )
