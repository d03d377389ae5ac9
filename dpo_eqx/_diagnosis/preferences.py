"""How a policy ranks pairs, as sums that join exactly over batches and devices.

Accuracy, win rate, margins with their spread, KL and calibration are here. `compare.py` and
`diagnose.py` compute the values that are summed.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._arrays.log_probs import PairLogProbs
from .._arrays.metrics import safe_ratio, wins
from .._jax.mapped_axes import AxisName, total

Values = Float[Array | np.ndarray, " pairs"]


class Calibration(eqx.Module):
    r"""Sums of predicted and observed preferences, by how sure the policy is; `a + b` joins two.

    For each pair, the prediction is that the completion which the policy prefers is the chosen one,
    with probability $\sigma(|\text{margin}|)$, in `[0.5, 1]`. A tie counts as one half true. The
    bins divide `[0.5, 1]` equally. If the margins of a policy are the log-odds of the labels,
    prediction and frequency agree in every bin.

    **Arguments:**

    - `predicted`, `came_true`, `weight`: weighted sums, and the sum of weights. Shape `(bins,)`.
    - `count`: the number of pairs whose weight is not 0. Shape `(bins,)`.
    """

    predicted: Float[Array, " bins"]
    came_true: Float[Array, " bins"]
    weight: Float[Array, " bins"]
    count: Int[Array, " bins"]

    def __add__(self, other: "Calibration") -> "Calibration":
        return jax.tree.map(jnp.add, self, other)

    def mean(self) -> tuple[Float[Array, " bins"], Float[Array, " bins"]]:
        """The mean prediction, and the frequency with which it came true; 0 in an empty bin."""
        ratio = jax.vmap(safe_ratio)
        return ratio(self.predicted, self.weight), ratio(self.came_true, self.weight)


def calibrate(margin: Values, weight: Values | None = None, *, bins: int = 10) -> Calibration:
    r"""How often the completion that a policy prefers is the chosen one; see `Calibration`.

    **Arguments:**

    - `margin`: the chosen reward minus the rejected reward, `beta` included. It is the log-odds
        that the chosen completion is preferred, under the Bradley-Terry model. Shape `(pairs,)`.
    - `weight`: the weight of each pair. A pair of weight 0 does not count, whatever its margin.
        Shape `(pairs,)`.
    - `bins`: the number of bins.

    **Raises:**

    `ValueError` if `bins` is not positive.
    """
    if bins < 1:
        raise ValueError(f"`bins` must be a positive number of bins; got {bins}.")
    margin, weight = _with_weight(margin, weight)
    predicted = jax.nn.sigmoid(jnp.abs(margin))
    place = jnp.clip(jnp.floor((predicted - 0.5) * (2 * bins)), 0, bins - 1)
    inside = (place[:, None] == jnp.arange(bins, dtype=place.dtype)[None, :]) & (weight > 0)[
        :, None
    ]
    share = jnp.where(inside, weight[:, None], 0)
    return Calibration(
        predicted @ share, wins(margin) @ share, share.sum(axis=0), inside.sum(axis=0)
    )


class Preferences(eqx.Module):
    """How a policy ranks pairs, over one batch or many: `a + b` joins two exactly.

    **Arguments:**

    - `weight`: the sum of all weights; `pairs`: the number of pairs whose weight is not 0.
    - `accurate`, `won`, `kl`: weighted sums over pairs; `kl` is `None` if it was not requested.
    - `margin`: the weighted *mean*, and `spread` the weighted sum of squared distances from it.
        They are joined by the rule of Chan, Golub and LeVeque, which avoids the cancellation of a
        sum of squares.
    - `calibration`: a `Calibration` of the same pairs.
    """

    weight: Float[Array, ""]
    pairs: Int[Array, ""]
    accurate: Float[Array, ""]
    won: Float[Array, ""]
    margin: Float[Array, ""]
    spread: Float[Array, ""]
    kl: Float[Array, ""] | None
    calibration: Calibration

    def __add__(self, other: "Preferences") -> "Preferences":
        joined = jax.tree.map(jnp.add, self, other)
        part = safe_ratio(other.weight, joined.weight)
        apart = other.margin - self.margin
        spread = joined.spread + apart**2 * self.weight * part
        return eqx.tree_at(
            lambda p: (p.margin, p.spread), joined, (self.margin + apart * part, spread)
        )

    def __radd__(self, other: object) -> "Preferences":
        # `sum(batches)` starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def mean(self) -> dict[str, Float[Array, ""]]:
        """The weighted means, or 0 if the weights sum to 0.

        `preference_accuracy`: how often the policy gives the chosen completion the higher
        probability; `win_rate`: how often the chosen completion has the higher implicit reward;
        ties count one half. `reward_margin_mean` and `reward_margin_std` (of the pairs, not of the
        mean) are in the unit of the rewards. `kl` is in nats per completion, over chosen and
        rejected ones.
        """
        means = {
            "preference_accuracy": safe_ratio(self.accurate, self.weight),
            "win_rate": safe_ratio(self.won, self.weight),
            "reward_margin_mean": self.margin,
            "reward_margin_std": jnp.sqrt(safe_ratio(self.spread, self.weight)),
        }
        return means if self.kl is None else means | {"kl": safe_ratio(self.kl, self.weight)}


def count_preferences(
    policy: PairLogProbs,
    margin: Values,
    kl: tuple[Values, Values] | None = None,
    *,
    weight: Values | None = None,
    bins: int = 10,
    axis_name: AxisName | None = None,
) -> Preferences:
    """Sums of one batch, from which `mean()` computes preference accuracy, win rate and margins.

    ```python
    sides = dpx.compare(policy, reference, batch)
    margin = dpx.diagnose(loss, sides.policy, sides.reference).margin
    counted = dpx.count_preferences(sides.policy, margin, (sides.chosen_kl, sides.rejected_kl))
    ```

    **Arguments:**

    - `policy`: the policy's log-probabilities.
    - `margin`: chosen reward minus rejected reward, `beta` included. Shape `(pairs,)`.
    - `kl`: the KL of the chosen and of the rejected completions. Shape `(pairs,)` each.
    - `weight`: the weight of each pair, by default `policy.weight`. A pair of weight 0 adds
        nothing, not even NaN.
    - `bins`: the number of bins of the calibration.
    - `axis_name`: a mapped axis over which the pairs are split; the sums are then over all devices
        of the axis.
    """
    weight = policy.weight if weight is None else weight
    margin, weight = _with_weight(margin, weight)
    log_odds = _present(jnp.asarray(policy.chosen) - jnp.asarray(policy.rejected), weight)
    weight_sum = total(weight.sum(), axis_name)
    mean = safe_ratio(total((margin * weight).sum(), axis_name), weight_sum)
    sums = {
        "pairs": (weight > 0).sum(),
        "accurate": (wins(log_odds) * weight).sum(),
        "won": (wins(margin) * weight).sum(),
        "spread": ((margin - mean) ** 2 * weight).sum(),
        "kl": None if kl is None else (_present((kl[0] + kl[1]) / 2, weight) * weight).sum(),
        "calibration": calibrate(margin, weight, bins=bins),
    }
    return Preferences(weight=weight_sum, margin=mean, **total(sums, axis_name))


def _with_weight(
    margin: Values, weight: Values | None
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    """Margin and weight as arrays of one dtype, with margin 0 at weight 0."""
    margin = jnp.asarray(margin)
    weight = jnp.ones_like(margin) if weight is None else jnp.asarray(weight, margin.dtype)
    return _present(margin, weight), weight


def _present(values: Values, weight: Float[Array, " pairs"]) -> Float[Array, " pairs"]:
    return jnp.where(weight > 0, jnp.asarray(values), 0).astype(weight.dtype)
