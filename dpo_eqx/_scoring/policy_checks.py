"""Checks of a policy and of its results; the errors name its class and a remedy.

`predict.py` runs the policy.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._jax.describe import described


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


def checked_logits(policy: PyTree, returned: Any, ids: Array) -> Float[Array, "length vocab"]:
    """The result of `policy(ids)`; raises `ValueError` if it is not the logits of one sequence."""
    if _is_floating(returned) and returned.ndim == 2 and returned.shape[0] == ids.size:
        return jnp.asarray(returned)
    raise ValueError(
        f"`policy(ids)` must return logits of shape `(length, vocab)`, here ({ids.size}, vocab) "
        f"for `ids` of shape {ids.shape}; got {described(returned)} from {type(policy).__name__}. "
        f"{_remedy(returned, 'logits')}"
    )


def checked_hidden(
    policy: PyTree, returned: Any, ids: Array, unembedding: Array
) -> Float[Array, "length width"]:
    """The result of `policy.hidden(ids, layout)`; raises if it is not one state for each token."""
    want = (ids.size, unembedding.shape[-1])
    if _is_floating(returned) and returned.shape == want:
        return jnp.asarray(returned)
    raise ValueError(
        f"`policy.hidden(ids, layout)` must return shape `(length, width)`, here {want} for `ids` "
        f"of shape {ids.shape} and `unembedding` of shape {unembedding.shape}; "
        f"got {described(returned)} from {type(policy).__name__}. "
        f"{_remedy(returned, 'hidden states')}"
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
    return "Check that the parameters are floating-point JAX arrays, in fields that are not static."


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
