"""Calls a policy, and checks it and its results; the errors name its class and a remedy.

`predict.py` decides what the policy is run on.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._jax.describe import described
from .._jax.keys import Keys
from ..protocols import RecurrentPolicy
from .adapter_lines import (
    adapter_line,
    fails_in_vmap,
    longest_length,
    only_needs_key,
    takes_batch,
    vector_size,
)

_MAP_ADVICE = (
    "It runs on one row, but not under `jax.vmap`. Run the rows one after the other: "
    '`score=functools.partial(dpx.score_pairs, how="map")`.'
)
_KEY_ADVICE = (
    "It needs a key in training, as dropout does: pass `key=` to the step, a new one each time. To "
    "score it without a key, switch its dropout off: `eqx.nn.inference_mode(policy)`."
)
# The word for the model that runs, in messages.
_ROLE: ContextVar[str] = ContextVar("_ROLE", default="policy")


@contextlib.contextmanager
def as_reference() -> Iterator[None]:
    """Inside it, the errors of this file say that the reference was run."""
    token = _ROLE.set("reference")
    try:
        yield
    except Exception as error:
        error.add_note("This was raised while the reference was run, not the policy.")
        raise
    finally:
        _ROLE.reset(token)


def check_is_policy(policy: PyTree) -> None:
    """Raises if `policy` cannot be run: `None`, a class, or an object that cannot be called."""
    wanted = "`policy` must be a callable pytree, such as an instance of an `eqx.Module`"
    if isinstance(policy, type):
        raise ValueError(
            f"{wanted}; got the class {policy.__name__}. Make an instance of it by "
            f"`{policy.__name__}(..., key=key)`."
        )
    # A `FastPolicy` is run by its method `hidden`, so it need not be callable.
    if not callable(policy) and not hasattr(policy, "hidden"):
        raise ValueError(
            f"{wanted}; got {described(policy)}. Give it a method `__call__(self, ids)` that "
            "returns logits of shape `(length, vocab)`."
        )


def call_policy(policy: PyTree, ids: Array, key: Keys | None) -> Float[Array, "length vocab"]:
    """`policy(ids)`, or `policy(ids, key=key)` with a key.

    **Raises:**

    `ValueError` if the policy has another signature, or does not return the logits of one sequence.
    The policy's own errors get a note that says how it was called.
    """
    try:
        returned = policy(ids) if key is None else policy(ids, key=key)
    except Exception as error:
        _explain(error, policy, ids, key)
        raise
    return checked_logits(policy, returned, ids, key)


def call_policy_on_batch(
    policy: PyTree, rows: Int[Array, "rows length"], key: Keys | None
) -> Float[Array, "rows length vocab"]:
    """The logits of all rows from one call of a policy that takes a batch.

    **Raises:**

    `ValueError` if the policy does not return the logits of each row.
    """
    advice = 'If the policy takes one sequence, leave out `how="batch"`.'
    try:
        returned = policy(rows) if key is None else policy(rows, key=key)
    except Exception as error:
        error.add_note(
            f'This was raised by `{_called(key)}` of class {type(policy).__name__}, by `how="batch"'
            f"` called with `ids` of shape {rows.shape} in {rows.dtype}. {advice}"
        )
        raise
    if _is_floating(returned) and returned.ndim == 3 and returned.shape[:2] == rows.shape:
        return jnp.asarray(returned)
    raise ValueError(
        f'`{_called(key)}` must return logits of shape `(rows, length, vocab)` with `how="batch"`, '
        f"here {rows.shape} and vocab; got {described(returned)} from {type(policy).__name__}. "
        f"{advice}"
    )


def checked_logits(
    policy: PyTree, returned: Any, ids: Array, key: Keys | None = None
) -> Float[Array, "length vocab"]:
    """The result of `policy(ids)`; raises `ValueError` if it is not the logits of one sequence."""
    if _is_floating(returned) and returned.ndim == 2 and returned.shape[0] == ids.size:
        return jnp.asarray(returned)
    line = adapter_line(policy, ids, key)
    wrap = "" if line is None else f" Adapt the model: {line}{_batch_advice(policy, ids, key)}"
    raise ValueError(
        f"`{_called(key)}` must return logits of shape `(length, vocab)`, here ({ids.size}, vocab) "
        f"for `ids` of shape {ids.shape}; got {described(returned)} from {type(policy).__name__}. "
        f"{_remedy(returned, 'logits')}{wrap}"
    )


def _explain(error: Exception, policy: PyTree, ids: Array, key: Keys | None) -> None:
    """Raises `ValueError` with a remedy, or adds a note to the policy's own `error`."""
    name = type(policy).__name__
    # The errors of the library's own models have remedies already.
    is_ours = type(policy).__module__.startswith("dpo_eqx.models")
    remedy = None if is_ours else _remedy_of_call(policy, ids, key)
    if remedy is None:
        error.add_note(
            f"This was raised by `{_called(key)}` of class {name}, called with `ids` of shape "
            f"{ids.shape} in {ids.dtype}."
        )
        return
    reason = str(error).strip().split("\n")[0].rstrip(".")
    raise ValueError(
        f"`{_called(key)}` must take the ids of one sequence, here {described(ids)}, and return "
        f"logits of shape ({ids.size}, vocab); got {type(error).__name__} from {name}: {reason}. "
        f"{remedy}"
    ) from error


def _remedy_of_call(policy: PyTree, ids: Array, key: Keys | None) -> str | None:
    if (fails := fails_in_vmap(policy, ids, key)) is not None:
        return _MAP_ADVICE if fails else None
    if key is None and only_needs_key(policy, ids):
        return _KEY_ADVICE
    if line := adapter_line(policy, ids, key):
        return f"Adapt the model: {line}{_batch_advice(policy, ids, key)}"
    if longest := longest_length(policy, ids):
        return (
            f"The model runs on {longest} tokens, and not on {ids.size}: make the rows shorter, "
            "for instance by `max_length` of `data.tokenize`."
        )
    if size := vector_size(policy):
        return (
            f"The model takes a vector of {size} features, and not token ids: write a module that "
            "looks up an embedding of each token, and runs the model on them by `jax.vmap`."
        )
    return None


def _batch_advice(policy: PyTree, ids: Array, key: Keys | None) -> str:
    """The other remedy for a policy that takes a batch, after a space; or nothing."""
    if not takes_batch(policy, ids, key):
        return ""
    call = 'functools.partial(dpx.score_pairs, how="batch")'
    return f" Or give it whole batches: `score={call}`."


def _called(key: Keys | None) -> str:
    return f"{_ROLE.get()}(ids)" if key is None else f"{_ROLE.get()}(ids, key=key)"


def checked_hidden(
    policy: PyTree, returned: Any, ids: Array, unembedding: Array
) -> Float[Array, "length width"]:
    """The result of `policy.hidden(ids, layout)`; raises if it is not one state for each token."""
    want = (ids.size, unembedding.shape[-1])
    if _is_floating(returned) and returned.shape == want:
        return jnp.asarray(returned)
    raise ValueError(
        f"`{_ROLE.get()}.hidden(ids, layout)` must return shape `(length, width)`, here {want} "
        f"for `ids` of shape {ids.shape} and `unembedding` of shape {unembedding.shape}; "
        f"got {described(returned)} from {type(policy).__name__}. "
        f"{_remedy(returned, 'hidden states')}"
    )


def call_start(
    policy: RecurrentPolicy, ids: Array, length: Array, key: Keys | None
) -> tuple[Any, Float[Array, " width"]]:
    """`policy.start(ids, length)`, with `key=key` if there is a key.

    **Raises:**

    `ValueError` if the result is not a state and one hidden state.
    """
    width = policy.unembedding.shape[-1]
    with _told(policy, "start(ids, length)", ids):
        returned = policy.start(ids, length) if key is None else policy.start(ids, length, key=key)
    return _checked_state(policy, returned, "start(ids, length)", ids, (width,))


def call_extend(
    policy: RecurrentPolicy, state: Any, ids: Array, key: Keys | None
) -> tuple[Any, Float[Array, "length width"]]:
    """`policy.extend(state, ids)`, with `key=key` if there is a key.

    **Raises:**

    `ValueError` if the result is not a state and one hidden state for each token.
    """
    width = policy.unembedding.shape[-1]
    with _told(policy, "extend(state, ids)", ids):
        returned = policy.extend(state, ids) if key is None else policy.extend(state, ids, key=key)
    return _checked_state(policy, returned, "extend(state, ids)", ids, (ids.size, width))


def check_keeps_shapes(policy: RecurrentPolicy, state: PyTree, extended: PyTree) -> None:
    """Raises `ValueError` if `extend` changed the structure, a shape or a dtype of `state`."""
    before, after = (jax.tree.flatten(tree) for tree in (state, extended))
    changes = [
        f"{described(new)} from {described(old)}"
        for old, new in zip(before[0], after[0], strict=False)
        if (old.shape, old.dtype) != (new.shape, new.dtype)
    ]
    if before[1] == after[1] and not changes:
        return
    got = changes[0] if changes else f"{after[1]} from {before[1]}"
    raise ValueError(
        "`policy.extend(state, ids)` must return a state of the same structure, shapes and dtypes "
        f"as `state`, to draw tokens in a loop; got {got}, in {type(policy).__name__}. Allocate "
        "its arrays in their final sizes in `start`, or draw without the state, by "
        "`dpx.adapt(policy, lambda policy, ids, key: policy(ids))`."
    )


@contextlib.contextmanager
def _told(policy: PyTree, call: str, ids: Array) -> Iterator[None]:
    """Inside it, errors get a note that says which method of the policy was called, and how."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"This was raised by `{_ROLE.get()}.{call}` of class {type(policy).__name__}, called "
            f"with `ids` of shape {ids.shape} in {ids.dtype}. `help(dpo_eqx.RecurrentPolicy)` "
            "shows the methods that it must have."
        )
        raise


def _checked_state(
    policy: RecurrentPolicy, returned: Any, call: str, ids: Array, want: tuple[int, ...]
) -> tuple[Any, Array]:
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    if is_pair and _is_floating(returned[1]) and returned[1].shape == want:
        return returned[0], jnp.asarray(returned[1])
    if not is_pair:
        remedy = "Return the two as a tuple."
    elif _is_floating(returned[0]) and returned[0].shape == want:
        remedy = "Return the state first, and then the hidden states."
    elif len(want) == 1:
        remedy = "Return the hidden state of the last real token alone: `hidden[length - 1]`."
    else:
        remedy = _remedy(returned[1], "hidden states")
    form = "(width,)" if len(want) == 1 else "(length, width)"
    raise ValueError(
        f"`{_ROLE.get()}.{call}` must return `(state, hidden)` with `hidden` of shape `{form}`, "
        f"here {want} for `ids` of shape {ids.shape} and `unembedding` of shape "
        f"{policy.unembedding.shape}; got {described(returned)} from {type(policy).__name__}. "
        f"{remedy}"
    )


def where_arrays_are(policy: PyTree) -> str:
    """A hint for the error about a policy without arrays: what hides them, and the remedy."""
    if policy is None or isinstance(policy, type):
        return f"The policy is {described(policy)}; give an instance of an `eqx.Module`."
    if isinstance(policy, functools.partial | types.FunctionType | types.MethodType):
        return (
            f"The policy is a {type(policy).__name__}, which hides its arrays from JAX. Make it an "
            "`eqx.Module` with the arrays, or the model that it calls, as fields; or use "
            "`jax.tree_util.Partial` instead of `functools.partial`."
        )
    return "Check that the parameters are floating-point arrays, in fields that are not static."


def _is_floating(returned: Any) -> bool:
    is_array = isinstance(returned, jax.Array | np.ndarray)
    return is_array and jnp.issubdtype(returned.dtype, jnp.floating)


def _remedy(returned: Any, what: str) -> str:
    if isinstance(returned, tuple | list | dict):
        return (
            f"Return the {what} alone: wrap the policy in an `eqx.Module` that picks them from "
            "its result."
        )
    if not isinstance(returned, jax.Array | np.ndarray):
        return f"Return the {what} as an array."
    if not jnp.issubdtype(returned.dtype, jnp.floating):
        return f"The {what} must be real floating-point numbers."
    if returned.ndim == 1:
        return f"Return the {what} of every token, not only of the last token."
    return "A policy is written for one sequence; the batch axis is added by `vmap`."
