"""Metrics: per-pair quantities, and their exact means over batches, microbatches and devices.

A metric is accumulated as a sum and a count, so that the mean over ragged batches is exact.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._arrays.log_probs import PairLogProbs, UnpairedLogProbs
from .._arrays.loss_values import PairLoss, UnpairedLoss
from .._arrays.metrics import Metrics, MetricValues, Value, wins
from .._jax.describe import described
from ..losses._numerics import present
from .token_metrics import of_single_tokens, of_tokens


def default_metrics(
    policy: PairLogProbs | UnpairedLogProbs,
    reference: PairLogProbs | UnpairedLogProbs | None,
    loss: PairLoss | UnpairedLoss,
) -> dict[str, MetricValues]:
    """The metrics that users of TRL plot, under the same names, before averaging.

    `loss`; `rewards/chosen`, `rewards/rejected`, `rewards/margins`: the implicit rewards;
    `rewards/accuracies`: 1 if the chosen reward is higher, **one half for a tie** (TRL counts 0,
    so its first step shows 0.0); `logps/chosen`, `logps/rejected`: the policy's summed
    log-probabilities, in nats. For unpaired data, the chosen completions are those with a true
    label and the rejected ones those with a false label; each mean is over its own weights, and
    there is no accuracy.

    If `metrics` of the score asked for them, there are more, as TRL defines them: `entropy`, over
    all tokens of both completions; `mean_token_accuracy`, over the chosen tokens; `logits/chosen`,
    `logits/rejected`, the mean logit. Each is a mean over tokens, exact over microbatches and
    devices, where TRL averages the means of microbatches. For unpaired data it is a mean over the
    tokens of each completion, averaged as the loss is. With `data.batches(average="tokens")` that
    is the mean over the tokens of the batch.

    Your own function of this form can replace it. Add a metric in one line by
    `lambda *args: default_metrics(*args) | {"margin/max": ...}`.

    **Arguments:**

    - `policy`, `reference`: the log-probabilities that the loss was given.
    - `loss`: the result of the loss.

    **Returns:**

    For each name, an array of shape `(pairs,)`, averaged with the batch's weights. A mask may come
    with the array, and the mean is then over its true positions; or weights, such as numbers of
    tokens, by which the batch's weights are multiplied.
    """
    del reference
    if isinstance(policy, UnpairedLogProbs):
        return _unpaired(policy, loss) | of_single_tokens(policy)
    return _paired(policy, loss) | of_tokens(policy)


def _paired(policy: Any, loss: Any) -> dict[str, MetricValues]:
    chosen, rejected = loss.chosen_reward, loss.rejected_reward
    return {
        "loss": loss.loss,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        # A tie counts one half, so that identical policies have an accuracy of 0.5.
        "rewards/accuracies": wins(chosen - rejected),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }


def _unpaired(policy: Any, loss: Any) -> dict[str, MetricValues]:
    label = jnp.asarray(policy.label)
    return {
        "loss": loss.loss,
        "rewards/chosen": (loss.reward, label),
        "rewards/rejected": (loss.reward, ~label),
        "logps/chosen": (policy.completion, label),
        "logps/rejected": (policy.completion, ~label),
    }


def weighted_sums(values: Any, weight: Float[Array, " pairs"]) -> Metrics:
    """The sums and counts of per-pair `values`; a pair of weight 0 adds nothing, not even NaN.

    `values` are the result of a function of the form of `default_metrics`.
    """
    if not isinstance(values, Mapping):
        raise ValueError(
            "`metrics` must return a dict of arrays with one value per pair, by name; got "
            f"{described(values)}."
        )
    sums, counts = {}, {}
    for name, value in values.items():
        value, value_weight = _own_weight(name, value, weight)
        value = present(value.astype(value_weight.dtype), value_weight)
        sums[name] = (value * value_weight).sum()
        counts[name] = value_weight.sum()
    return Metrics(sums, counts)


def _own_weight(
    name: str, value: Any, weight: Float[Array, " pairs"]
) -> tuple[Value, Float[Array, " pairs"]]:
    """The array of a metric, and the weights for its mean."""
    value, mask = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    _check_metric(name, value, weight.shape)
    if mask is None:
        return value, weight
    if _is_array(mask) and mask.shape == weight.shape:
        if mask.dtype == bool:
            return value, jnp.where(mask, weight, 0)
        if jnp.issubdtype(mask.dtype, jnp.floating):
            return value, mask.astype(weight.dtype) * weight
    raise ValueError(
        f"The metric {name!r} must have a boolean mask of shape {weight.shape}, true at the "
        "pairs that its mean includes, or floating-point weights of this shape; got "
        f"{described(mask)}."
    )


def _check_metric(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if _is_array(value) and value.shape == shape and not jnp.iscomplexobj(value):
        return
    raise ValueError(
        f"The metric {name!r} must have one value per pair, shape {shape}, in an array of real "
        f"numbers, or such an array and a mask; got {described(value)}. The weighted mean is taken "
        "afterwards; a number that is the same for all pairs becomes an array by "
        "`jnp.full_like(loss.loss, number)`."
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)
