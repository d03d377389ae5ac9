"""Adapts a model of any signature to a policy, without a change to the model or its paths.

Checks of policies are in `check_policy.py`.
"""

import abc
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._arrays.layout import AbstractLayout
from .._jax.describe import described

Call = Callable[[Any, Any, Any], Any]


def adapt(
    model: PyTree,
    call: Call,
    *,
    hidden: Callable[..., Array] | None = None,
    unembedding: Callable[[Any], Any] | None = None,
) -> "Adapted":
    """A policy that runs `call(model, ids, key)`; its leaves and their paths are those of `model`.

    ```python
    policy = dpx.adapt(model, lambda model, ids, key: model(ids[None], key=key).logits[0])
    ```

    The policy is an Equinox module. All that goes by leaves or paths works as on `model`: filters,
    `eqx.tree_at`, adapters, sharding rules, donation and files. `policy.model` is the model.

    **Arguments:**

    - `model`: any pytree: a module, or for instance a tuple of two modules.
    - `call`: a function of the model, `ids` of shape `(length,)`, and a key, which is `None` for
        the reference and in evaluation. It returns logits of shape `(length, vocab)`. The function
        is part of the structure of the policy: define it once, outside of loops. With `how="batch"`
        of `score_pairs`, both shapes begin with the axis of rows.
    - `hidden`: a function `(model, ids, layout, key)` that returns the last hidden states of shape
        `(length, width)`. With it and `unembedding`, the policy is a `FastPolicy`.
    - `unembedding`: a function of the model that returns the output embedding of shape
        `(vocab, width)`, or an `eqx.nn.Linear`, whose bias then counts, too.

    **Returns:**

    A policy `policy(ids, *, key=None)`.

    **Raises:**

    `ValueError` if an argument is not a function, or only one of `hidden` and `unembedding` is
    given.
    """
    if (hidden is None) != (unembedding is None):
        names = "hidden", "unembedding"
        given, missing = names if unembedding is None else reversed(names)
        raise ValueError(
            f"`hidden` and `unembedding` must be given together; got only `{given}`. Give "
            f"`{missing}` as well, or leave both out."
        )
    functions = {"call": call, "hidden": hidden, "unembedding": unembedding}
    for name, function in functions.items():
        is_absent = name != "call" and function is None
        if not is_absent and not (callable(function) and isinstance(function, Hashable)):
            raise ValueError(
                f"`{name}` must be a function whose first argument is the model; got "
                f"{described(function)}."
            )
    if hidden is None or unembedding is None:
        return Adapted(model, call)
    return FastAdapted(model, call, hidden, unembedding)


@dataclass(frozen=True, eq=False)
class Adapted:
    """A model with the function that calls it; see `adapt`.

    It is flattened as the model itself, so that no path has a prefix. Equinox gives each module one
    path for each of its fields, hence this is not a subclass of `eqx.Module`, but is registered as
    one, and as a pytree, below.
    """

    model: Any
    call: Call

    def __call__(
        self, ids: Int[Array | np.ndarray, "*rows length"], *, key: PRNGKeyArray | None = None
    ) -> Any:
        """The logits that `call` returns; `how="batch"` of the scores gives it several rows."""
        return self.call(self.model, ids, key)


@dataclass(frozen=True, eq=False)
class FastAdapted(Adapted):
    """An adapted model that offers `FastPolicy`."""

    run_hidden: Callable[..., Array]
    find_unembedding: Callable[[Any], Any]

    def hidden(
        self, ids: Int[Array, " length"], layout: AbstractLayout, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "length width"]:
        """The last hidden states."""
        return self.run_hidden(self.model, ids, layout, key)

    @property
    def unembedding(self) -> Float[Array, "vocab width"]:
        """The output embedding of each token."""
        head = self.find_unembedding(self.model)
        return head.weight if isinstance(head, eqx.nn.Linear) else head

    @property
    def unembedding_bias(self) -> Float[Array, " vocab"] | None:
        """The bias of the output layer, if it has one."""
        head = self.find_unembedding(self.model)
        return head.bias if isinstance(head, eqx.nn.Linear) else None


def _flatten_with_keys(adapted: Adapted) -> tuple[list[tuple[Any, Any]], Any]:
    """The children of the model with their own keys."""
    model = adapted.model
    found, structure = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: node is not model
    )
    functions = {name: value for name, value in vars(adapted).items() if name != "model"}
    # A model that is a leaf has no key of its own.
    keyed = [(path[0] if path else jax.tree_util.GetAttrKey("model"), x) for path, x in found]
    return keyed, (structure, tuple(functions.items()))


def _flatten(adapted: Adapted) -> tuple[list[Any], Any]:
    keyed, static = _flatten_with_keys(adapted)
    return [child for _, child in keyed], static


def _register(kind: type[Adapted]) -> None:
    def unflatten(static: Any, children: Any) -> Adapted:
        structure, functions = static
        return kind(structure.unflatten(children), **dict(functions))

    jax.tree_util.register_pytree_with_keys(kind, _flatten_with_keys, unflatten, _flatten)
    # Equinox's own `register` refuses, because nothing would check abstract attributes; there are
    # none here.
    abc.ABCMeta.register(eqx.Module, kind)


_register(Adapted)
_register(FastAdapted)
