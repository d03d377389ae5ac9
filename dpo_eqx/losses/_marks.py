"""Marks on losses: which losses couple pairs, and which losses a loss is made of.

The step and the combinators read the marks. No arithmetic is here.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from .._jax.explicit_meshes import automatic

# `Callable` without parameters, since typeguard cannot check a bound with parameters.
Loss = TypeVar("Loss", bound=Callable)

_ATTRIBUTE = "_dpo_eqx_marks"


@dataclasses.dataclass(frozen=True)
class Marks:
    """The properties of a loss that the library needs and that its signature does not show.

    **Arguments:**

    - `couples_pairs`: whether the value of one pair depends on the other pairs.
    - `reference_free`: whether the loss replaces the reference by log-probabilities of 0.
    - `inner`: the losses that this one calls.
    """

    couples_pairs: bool = False
    reference_free: bool = False
    inner: tuple[Callable[..., Any], ...] = ()


def marked(loss: Loss, marks: Marks) -> Loss:
    """`loss` with `marks` in place of its earlier marks, which `functools.wraps` copies."""
    setattr(loss, _ATTRIBUTE, marks)
    return loss


def marks_of(loss: Callable[..., Any]) -> Marks:
    """The marks of `loss` itself, not of the losses that it calls."""
    return getattr(loss, _ATTRIBUTE, Marks())


def couples_pairs(loss: Loss) -> Loss:
    """Marks a loss whose value for one pair depends on the other pairs: a sort, a batch mean.

    `make_grad` then gives it the log-probabilities of the whole global batch, over microbatches
    and devices. If microbatches split the batch, this takes a second forward pass of the policy.
    The loss must use `policy.weight` in its statistics, so that rows of weight 0 have no influence.

    ```python
    @losses.couples_pairs
    def centred_dpo(policy, reference, *, beta=0.1): ...
    ```

    **Arguments:**

    - `loss`: any callable of the form of a loss. It is not changed.

    **Returns:**

    A loss with the same values, marked.
    """

    on_any_mesh = automatic(loss)

    @functools.wraps(loss)
    def coupled(*args: Any, **keywords: Any) -> Any:
        return on_any_mesh(*args, **keywords)

    return cast("Loss", marked(coupled, Marks(couples_pairs=True, inner=(loss,))))


def is_coupled(loss: Callable[..., Any]) -> bool:
    """Whether `loss`, or any loss that it is made of, is marked by `couples_pairs`."""
    return any(marks_of(part).couples_pairs for part, _ in parts(loss))


def parts(loss: Callable[..., Any]) -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    """Every function that `loss` is made of, through `partial` and the combinators.

    Each function comes with the keywords that `partial` has bound to it.
    """
    bound: dict[str, Any] = {}
    while isinstance(loss, functools.partial):
        bound = {**loss.keywords, **bound}
        loss = loss.func
    yield loss, bound
    for inner in marks_of(loss).inner:
        yield from parts(inner)


def takes(loss: Callable[..., Any], keyword: str) -> bool:
    """Whether `loss`, or any loss that it is made of, takes `keyword` and has not bound it."""
    if isinstance(loss, functools.partial):
        return keyword not in loss.keywords and takes(loss.func, keyword)
    parameters = inspect.signature(loss).parameters.values()
    shown = any(p.kind is p.VAR_KEYWORD or p.name == keyword for p in parameters)
    inner = marks_of(loss).inner
    return shown and (not inner or any(takes(part, keyword) for part in inner))
