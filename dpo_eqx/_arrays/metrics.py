"""Metrics as weighted sums and counts, whose means are exact over ragged batches.

The metrics themselves are in `_training/metrics.py`.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

# One value for each pair. If a mask comes with the values, the mean is over its true positions; if
# numbers come with them, these are weights, which multiply the batch's.
Value = Shaped[Array | np.ndarray, "..."]
MetricValues = Value | tuple[Value, Bool[Array, "..."] | Float[Array, "..."]]


class Metrics(eqx.Module):
    """Weighted sums of metrics, and the sums of their weights; `a + b` joins two batches.

    **Arguments:**

    - `sums`: the weighted sum of each metric. Scalars.
    - `counts`: the sum of the weights in each of these sums. Scalars.
    """

    sums: dict[str, Float[Array, ""]]
    counts: dict[str, Float[Array, ""]]

    def __add__(self, other: "Metrics") -> "Metrics":
        if self.sums.keys() != other.sums.keys():
            raise ValueError(
                "`Metrics` can only be added if they have the same names; got "
                f"{sorted(self.sums)} and {sorted(other.sums)}."
            )
        return jax.tree.map(jnp.add, self, other)

    def __radd__(self, other: Any) -> "Metrics":
        # `sum(batches)` starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def mean(self) -> dict[str, Float[Array, ""]]:
        """The weighted mean of each metric, or 0 if its weights sum to 0.

        If `rewards/margins` has no sum of its own (unpaired data), it is the difference of
        `rewards/chosen` and `rewards/rejected`.
        """
        means = {name: safe_ratio(self.sums[name], self.counts[name]) for name in self.sums}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            margin = means["rewards/chosen"] - means["rewards/rejected"]
            means.setdefault("rewards/margins", margin)
        return means


def wins(difference: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 for a positive difference, 0 for a negative one, one half for a tie."""
    return (1 + jnp.sign(difference)) / 2


def safe_ratio(numerator: Float[Array, ""], denominator: Float[Array, ""]) -> Float[Array, ""]:
    """`numerator / denominator`, or 0 if the denominator, a sum of weights, is 0."""
    return jnp.where(denominator > 0, numerator, 0) / jnp.where(denominator > 0, denominator, 1)
