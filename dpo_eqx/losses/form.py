"""The form that every loss has: its result, its hyper-parameters, and the mark of coupled pairs.

The losses themselves are in the files beside this one, one algorithm a function.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..explicit import automatic
from ..log_probs import PairLogProbs, UnpairedLogProbs, check_one_shape
from ..scalars import Number, PerPair
from .numerics import difference, wide

# A hyper-parameter: a number, a traced scalar, or one value per pair.
if TYPE_CHECKING:
    # A NumPy array is welcome too, see `scalars.py`.
    Scalar = float | Array
else:
    Scalar = Number | PerPair

# Bare, since typeguard cannot check a bound with parameters.
Loss = TypeVar("Loss", bound=Callable)
Reference = TypeVar("Reference")


class PairLoss(eqx.Module):
    """What a loss returns: nothing reduced, everything in the order of the pairs.

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
    """What a loss on unpaired completions returns, in their order.

    **Arguments:**

    - `loss`: the loss of each completion. Shape `(pairs,)`.
    - `reward`: the implicit reward of each completion, `beta` included. Shape `(pairs,)`.
    """

    loss: Float[Array, " pairs"]
    reward: Float[Array, " pairs"]

    def __check_init__(self):
        check_one_shape(self, "loss")


def log_ratios(
    policy: PairLogProbs, reference: PairLogProbs | None, *, needed_by: str
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    r"""The log-ratios $\rho = \log\pi - \log\pi^{ref}$ of the chosen and the rejected completions.

    No gradient flows into `reference`; where it is missing, a `ValueError` says how to give one.
    """
    reference = require_reference(reference, needed_by=needed_by)
    chosen = _difference(policy.chosen, reference.chosen)
    return chosen, _difference(policy.rejected, reference.rejected)


def log_ratio(
    policy: UnpairedLogProbs, reference: UnpairedLogProbs | None, *, needed_by: str
) -> Float[Array, " pairs"]:
    r"""`log_ratios` of single completions."""
    reference = require_reference(reference, needed_by=needed_by)
    return _difference(policy.completion, reference.completion)


def _difference(
    policy: Float[Array | np.ndarray, " pairs"], reference: Float[Array | np.ndarray, " pairs"]
) -> Float[Array, " pairs"]:
    return difference(wide(policy), jax.lax.stop_gradient(wide(reference)))


def require_reference(reference: Reference | None, *, needed_by: str) -> Reference:
    """`reference`, or a `ValueError` that lists the ways to give one."""
    if reference is None:
        raise ValueError(
            f"`{needed_by}` needs a reference and got none. Give one of: a policy as the argument "
            "`reference` of the step; precomputed log-probabilities as `batch.reference`, from "
            "`precompute_reference`; a view of the policy by `reference_of=`, such as "
            "`models.without_lora`. Or do without one by `losses.reference_free(loss)`."
        )
    return reference


def lengths(
    policy: PairLogProbs, *, needed_by: str
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    """The numbers of scored tokens, in the dtype of the losses.

    Where they are missing, a `ValueError` says where they come from.
    """
    for name in ("chosen_length", "rejected_length"):
        if getattr(policy, name) is None:
            raise ValueError(
                f"`{needed_by}` needs `policy.{name}`, the number of scored tokens, and got none. "
                "`score_pairs` fills it in; to make log-probabilities by hand, pass "
                f"`PairLogProbs(..., {name}=...)`."
            )
    dtype = wide(policy.chosen).dtype
    chosen, rejected = jnp.asarray(policy.chosen_length), jnp.asarray(policy.rejected_length)
    return chosen.astype(dtype), rejected.astype(dtype)


def averages(
    policy: PairLogProbs, *, needed_by: str
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    """Log-probabilities per scored token; those of an empty completion are its sum, 0."""
    chosen, rejected = lengths(policy, needed_by=needed_by)
    return (
        wide(policy.chosen) / jnp.maximum(chosen, 1),
        wide(policy.rejected) / jnp.maximum(rejected, 1),
    )


def check_positive(**values: Scalar) -> None:
    """Raises where a Python number is not positive; arrays, traced or not, pass."""
    for name, value in values.items():
        # `not value > 0`, since NaN compares false.
        if isinstance(value, Real) and not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")


def check_nonnegative(**values: Scalar) -> None:
    """Raises where a Python number is negative or NaN; arrays, traced or not, pass."""
    for name, value in values.items():
        if isinstance(value, Real) and not value >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")


def check_range(*, low: float | int, below: float | int, **values: Scalar) -> None:
    """Raises where a Python number is outside `[low, below)`; arrays, traced or not, pass."""
    for name, value in values.items():
        if isinstance(value, Real) and not low <= value < below:
            raise ValueError(f"`{name}` must be in [{low}, {below}), got {value}.")


def check_between(*, above: float | int, below: float | int, **values: Scalar) -> None:
    """Raises where a Python number is outside `(above, below)`; arrays, traced or not, pass."""
    for name, value in values.items():
        if isinstance(value, Real) and not above < value < below:
            raise ValueError(f"`{name}` must be in ({above}, {below}), got {value}.")


def couples_pairs(loss: Loss) -> Loss:
    """Marks a loss whose value for one pair depends on the other pairs: a sort, a batch mean.

    `make_grad` then hands it the log-probabilities of the whole global batch, over microbatches
    and devices. The price: the forward pass of the policy is run twice where microbatches split
    the batch. The loss must use `policy.weight` in its statistics, so that rows of weight 0 have
    no influence.

    ```python
    @losses.couples_pairs
    def centred_dpo(policy, reference, *, beta=0.1): ...
    ```

    **Arguments:**

    - `loss`: any callable of the form of a loss; it is not changed.

    **Returns:**

    The same loss, marked.
    """

    on_any_mesh = automatic(loss)

    @functools.wraps(loss)
    def coupled(*args: Any, **keywords: Any) -> Any:
        return on_any_mesh(*args, **keywords)

    coupled.couples_pairs = True  # pyright: ignore[reportAttributeAccessIssue]: it is the mark
    return cast("Loss", derived(coupled, loss))


def is_coupled(loss: Callable[..., Any]) -> bool:
    """Whether `loss`, or any loss that it is made of, is marked by `couples_pairs`."""
    return any(getattr(part, "couples_pairs", False) for part, _ in parts(loss))


def derived(loss: Loss, *inner: Callable[..., Any]) -> Loss:
    """Says that the combinator's result `loss` calls `inner`, so that their marks are seen."""
    loss.inner = inner  # pyright: ignore[reportFunctionMemberAccess]: read by `parts`
    return loss


def parts(loss: Callable[..., Any]) -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    """Every function that `loss` is made of, through `partial` and our combinators.

    Each comes with the keywords that `partial` has bound to it.
    """
    bound: dict[str, Any] = {}
    while isinstance(loss, functools.partial):
        bound = {**loss.keywords, **bound}
        loss = loss.func
    yield loss, bound
    for inner in getattr(loss, "inner", ()):
        yield from parts(inner)


def takes(loss: Callable[..., Any], keyword: str) -> bool:
    """Whether `loss`, or any loss that it is made of, takes `keyword` and has not bound it."""
    if isinstance(loss, functools.partial):
        return keyword not in loss.keywords and takes(loss.func, keyword)
    parameters = inspect.signature(loss).parameters.values()
    shown = any(p.kind is p.VAR_KEYWORD or p.name == keyword for p in parameters)
    inner = getattr(loss, "inner", ())
    return shown and (not inner or any(takes(part, keyword) for part in inner))
