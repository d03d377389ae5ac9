r"""The objective $\sum_i w_i \ell_i / \sum_i w_i$ as a function of log-probabilities.

Between a score and its pullback, this file computes the loss of each pair, and the slope: the
derivative of the objective with respect to each log-probability. Policies are not here.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._arrays.metrics import safe_ratio
from .._jax.describe import described
from .._jax.mapped_axes import AxisName, gather, own_rows, total
from .._jax.scalars import PerPair
from ..losses._marks import is_coupled, parts
from ..losses._numerics import present, wide
from ..protocols import Loss
from .metrics import weighted_sums


class Scored(eqx.Module):
    """All arguments of a loss for some pairs; the first axis of every array is the pairs."""

    policy: PyTree
    reference: PyTree
    per_pair: dict[str, PerPair] | None
    weight: Float[Array, " pairs"]


def pair_weights(batch: Any) -> Float[Array, " pairs"]:
    """The weight of each pair, 1 if the batch has no weights, in JAX's default floating dtype."""
    dtype = jnp.zeros(()).dtype
    if batch.weight is None:
        return jnp.ones(batch.pairs, dtype)
    return jnp.asarray(batch.weight).astype(dtype)


def loss_of(loss: Loss, scored: Scored, axis_name: AxisName | None) -> Any:
    """The loss of each pair; a loss that couples pairs sees the pairs of all devices."""
    return _on_all_pairs(lambda all_pairs: _call(loss, all_pairs), loss, scored, axis_name)


def loss_and_slopes(
    loss: Loss, scored: Scored, whole: Float[Array, ""], axis_name: AxisName | None
) -> tuple[Any, PyTree]:
    """The loss of each pair, and the objective's slopes with respect to `scored.policy`.

    **Arguments:**

    - `whole`: the sum of all weights, over microbatches and devices.

    **Returns:**

    The result of the loss, and a pytree like `scored.policy` with `None` for integers and
    booleans. A pair of weight 0 has slopes of exactly 0.
    """

    def on(pairs: Scored):
        floats, rest = eqx.partition(pairs.policy, eqx.is_inexact_array)

        def objective(floats):
            policy = eqx.combine(floats, rest)
            result = _call(loss, Scored(policy, pairs.reference, pairs.per_pair, pairs.weight))
            losses = wide(result.loss)
            weight = pairs.weight.astype(losses.dtype)
            # `present` before the product, because 0 * NaN is NaN.
            weighted = present(losses, weight) * weight
            return safe_ratio(weighted.sum(), whole.astype(weighted.dtype)), result

        slopes, result = jax.grad(objective, has_aux=True)(floats)
        return result, _present_rows(slopes, pairs.weight)

    return _on_all_pairs(on, loss, scored, axis_name)


def mean_loss(pairs: Scored, losses: Any, axis_name: AxisName | None) -> Float[Array, ""]:
    """The weighted mean loss over the global batch."""
    return total(weighted_sums({"loss": losses.loss}, pairs.weight), axis_name).mean()["loss"]


def check_is_loss(loss: Loss) -> None:
    """Raises `ValueError` if `loss` is not a function, but the name of a loss."""
    if not callable(loss):
        remedy = f"`losses.BY_NAME[{loss!r}]`" if isinstance(loss, str) else "`losses.dpo`"
        raise ValueError(
            "`loss` must be a function of the log-probabilities of policy and reference; got "
            f"{described(loss)}. Give {remedy}."
        )


def check_no_bound_axis(loss: Loss) -> None:
    """Raises if `partial` has bound an array with axes, which would not be split with the pairs."""
    for part, bound in parts(loss):
        for name, value in bound.items():
            if getattr(value, "ndim", 0) > 0:
                raise ValueError(
                    f"`{name}` of `{getattr(part, '__name__', part)}` is bound to an array of "
                    f"shape {value.shape}, which is not split when `microbatches` or `axis_name` "
                    f"split the pairs. Give it as `batch.per_pair={{{name!r}: ...}}`."
                )


def _on_all_pairs(
    function: Callable[[Scored], Any], loss: Loss, scored: Scored, axis_name: AxisName | None
) -> Any:
    """`function` on these pairs, or on the pairs of all devices if the loss couples pairs."""
    axis_name = axis_name if is_coupled(loss) else None
    return own_rows(function(gather(scored, axis_name)), axis_name, scored.weight.size)


def _call(loss: Loss, scored: Scored) -> Any:
    """The loss, on which a pair of weight 0 has no influence, even if it is NaN."""
    policy, reference = _present_rows((scored.policy, scored.reference), scored.weight)
    per_pair = {name: _as_floats(x, scored.weight) for name, x in (scored.per_pair or {}).items()}
    return checked_loss(loss, loss(policy, reference, **per_pair), scored.weight.shape)


def checked_loss(loss: Loss, returned: Any, shape: tuple[int, ...]) -> Any:
    """The result of `loss`; raises if it is not a `PairLoss` or similar, one loss per pair."""
    losses = getattr(returned, "loss", None)
    if not isinstance(losses, jax.Array | np.ndarray):
        raise ValueError(
            "`loss` must return a `losses.PairLoss(loss, chosen_reward, rejected_reward)`, or a "
            "`losses.UnpairedLoss(loss, reward)` for unpaired data, of arrays with one value per "
            f"pair; got {described(returned)} from {_name_of(loss)}."
        )
    if losses.shape != shape:
        raise ValueError(
            f"`loss` must return one loss per pair, unreduced, shape {shape}; got {losses.shape} "
            f"from {_name_of(loss)}. The weighted mean is taken by the step."
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(
            f"`loss` must return floating-point losses; got {losses.dtype} from {_name_of(loss)}."
        )
    return returned


def _as_floats(x: Array | np.ndarray, like: Array) -> Array | np.ndarray:
    """Casts integers to the dtype of `like`, so that `beta=1` has the same result as `beta=1.0`."""
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.asarray(x).astype(like.dtype)


def _name_of(loss: Loss) -> str:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return f"`{getattr(loss, '__name__', type(loss).__name__)}`"


def _present_rows(tree: PyTree, weight: Float[Array, " pairs"]) -> PyTree:
    """`tree` with 0 for every NaN and infinity of a pair of weight 0.

    Finite numbers stay, so that the derivative with respect to the pair's weight is right.
    """

    def clean(x):
        if not eqx.is_inexact_array(x):
            return x
        return present(x, weight.reshape(weight.shape + (1,) * (x.ndim - 1)))

    return jax.tree.map(clean, tree)
