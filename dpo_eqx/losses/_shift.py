"""The shift `delta` of `bco` and `bco_pair`: a running mean, or the mean of the batch.

The caller carries the running mean. The losses themselves are in `_unpaired` and `_anchored`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._arrays.log_probs import PairLogProbs, UnpairedLogProbs
from .._arrays.loss_values import PairLoss, UnpairedLoss
from ._form import Scalar
from ._marks import Marks, couples_pairs, marked, takes
from ._numerics import weighted_mean

LogProbs = TypeVar("LogProbs", PairLogProbs, UnpairedLogProbs)
Result = TypeVar("Result", PairLoss, UnpairedLoss)


def update_delta(
    delta: Scalar, batch_delta: Scalar, *, count: int | Int[Array, ""]
) -> Float[Array, ""]:
    r"""The running shift of `bco` and `bco_pair` after a batch: the mean over batches so far.

    $\delta + (\delta_b - \delta) / k$. The loop carries this value, like the optimiser's state.
    Pass it as an array, so that no step recompiles:

    ```python
    grad = dpx.make_grad(partial(losses.bco_pair, delta=delta))
    gradients, metrics = grad(policy, batch, reference)
    middle = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
    delta = losses.update_delta(delta, middle, count=step + 1)
    ```

    **Arguments:**

    - `delta`: $\delta$, the mean over the earlier batches, a reward. Any number at the first batch.
    - `batch_delta`: $\delta_b$ of this batch, halfway between the mean chosen and the mean rejected
        reward.
    - `count`: $k$, the number of batches so far, including this one. Under `jit`, pass an array,
        so that nothing recompiles.

    **Returns:**

    The mean of `count` batches, a scalar.

    ??? cite

        Jung et al., *Binary Classifier Optimization for Large Language Model Alignment*, 2024
        (arXiv 2404.04656).
    """
    step = jnp.asarray(batch_delta) - delta
    return delta + step / jnp.asarray(count).astype(step.dtype)


def batch_delta(loss: Callable[..., Result]) -> Callable[..., Result]:
    r"""`loss` with the shift of the batch in place of its argument `delta`.

    $\delta$ is halfway between the mean chosen (desirable) and the mean rejected (undesirable)
    reward, both weighted and over the global batch. No gradient flows through it. Couples pairs.

    **Arguments:**

    - `loss`: `losses.bco`, `losses.bco_pair`, or a function of that form with a keyword `delta`.

    **Returns:**

    A loss of the same form without the keyword `delta`.

    **Raises:**

    `ValueError` if `loss` takes no `delta`, or has bound it.
    """
    signature = inspect.signature(loss)
    if not takes(loss, "delta"):
        raise ValueError(
            "`batch_delta` takes a loss with a keyword `delta` that is not bound yet, such as "
            f"`losses.bco` or `losses.bco_pair`; got a loss with the arguments {signature}."
        )

    @functools.wraps(loss)
    def shifted(policy: LogProbs, reference: LogProbs | None, **keywords) -> Result:
        rewards = loss(policy, reference, delta=0.0, **keywords)
        return loss(policy, reference, delta=_middle(rewards, policy), **keywords)

    # `wraps` shows the signature of `loss`, but the caller cannot give a `delta` here.
    others = [p for p in signature.parameters.values() if p.name != "delta"]
    vars(shifted)["__signature__"] = signature.replace(parameters=others)
    return couples_pairs(marked(shifted, Marks(inner=(loss,))))


def _middle(result: PairLoss | UnpairedLoss, policy: Any) -> Float[Array, ""]:
    """Halfway between the mean rewards of good and bad, or the only mean if one is missing."""
    if isinstance(result, PairLoss):
        middle = weighted_mean((result.chosen_reward + result.rejected_reward) / 2, policy.weight)
        return jax.lax.stop_gradient(middle)
    weight = jnp.ones_like(result.reward) if policy.weight is None else jnp.asarray(policy.weight)
    sides = [jnp.where(policy.label == good, weight, 0) for good in (True, False)]
    means = jnp.stack([weighted_mean(result.reward, side) for side in sides])
    present = jnp.stack([side.sum() > 0 for side in sides])
    return jax.lax.stop_gradient(weighted_mean(means, present.astype(means.dtype)))
