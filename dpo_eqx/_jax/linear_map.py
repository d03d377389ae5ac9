"""Linear maps with a given transpose, differentiable to any order and in both modes.

A `custom_vjp` has no forward mode. A `custom_jvp` has one, and reverse mode transposes its tangent.
Here the caller gives that transpose, and JAX does not derive it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from .mapped_axes import varying_axes


def with_transpose(
    push: Callable[[Any], Any], pull: Callable[[Any], Any], operands: Any, like: Any
) -> Any:
    r"""`push(operands)`; reverse mode computes its transpose as `pull`.

    For a loop over tiles the transpose that JAX derives is slow and needs much memory. Higher
    derivatives, with respect to arrays that `push` closes over, come from the code of `push`.

    With $L$ for `push`, the result is $y$ in the triangular system $u = x$, $y - L u = 0$, of which
    `custom_linear_solve` has all derivatives. `jax.custom_derivatives.linear_call` is more direct,
    but supports neither `vmap` nor derivatives with respect to arrays that it closes over.

    **Arguments:**

    - `push`: a function that is linear in its argument, a pytree of arrays. Wrap the bodies of its
        loops in `per_tile`.
    - `pull`: its transpose, from the cotangents of the result to a pytree like `operands`, with the
        same shapes and dtypes.
    - `operands`: a pytree of arrays that vary over the same mapped axes.
    - `like`: a pytree of arrays with the shapes and dtypes of the result.
    """

    def system(unknowns):
        given, result = unknowns
        # Tied both ways, because the transposed system is differentiated too.
        pushed = push(_tied(given, result))
        return _tied((given, jax.tree.map(jnp.subtract, result, pushed)), pushed)

    def solve(_, sides):
        given, result = sides
        return given, jax.tree.map(jnp.add, result, push(given))

    def solve_transposed(_, sides):
        given, result = sides
        return jax.tree.map(jnp.add, given, pull(result)), result

    zeros = jax.tree.map(jnp.zeros_like, like)
    sides = _tied((operands, zeros), operands)
    given, result = jax.lax.custom_linear_solve(system, sides, solve, solve_transposed)
    # Tied for the transposed solve, whose right-hand side is the cotangents of both.
    return _tied(result, (given, result))


# For the bodies of loops in `push`. Otherwise the transpose that JAX derives first computes
# everything that does not depend on the operands, for all tiles together: all logits, all scores.
per_tile = partial(jax.checkpoint, prevent_cse=False)


def moving(tangents: Any) -> Any:
    """The tangents of a `defjvp(..., symbolic_zeros=True)`, with `None` for those that are zero."""
    return jax.tree.map(
        lambda x: None if isinstance(x, SymbolicZero) else x,
        tangents,
        is_leaf=lambda x: isinstance(x, SymbolicZero),
    )


def sum_parts(tree: Any, axis_name: str | None, like: Array) -> Any:
    """The sum of all devices' parts over a mapped axis. The cotangents are replicated.

    `shard_map` with `check_vma=True`, under which `like` varies over the axis, transposes a sum
    correctly. Otherwise JAX transposes a sum to a sum. Here that would be too large by the number
    of devices, because all of them compute the same from the result.
    """
    if axis_name is None or axis_name in varying_axes(like):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)
    return with_transpose(lambda x: jax.lax.psum(x, axis_name), lambda x: x, tree, tree)


def share(tree: Any, axis_name: str | None, like: Array) -> Any:
    """A replicated `tree` that each device uses in a different way. The cotangents are summed.

    Does nothing if `shard_map` tracks which values vary: the cast in `vary_alike` sums them then.
    """
    if axis_name is None or axis_name in varying_axes(like):
        return tree
    return with_transpose(lambda x: x, lambda x: jax.lax.psum(x, axis_name), tree, tree)


def _tied(tree: Any, to: Any) -> Any:
    """`tree`, as if each of its arrays depended on all arrays of `to`.

    JAX differentiates a linear solve only if every part of its right-hand side depends on the
    differentiated arrays. The sum of no entries is 0, and XLA removes it.
    """
    nothing = [jax.lax.slice_in_dim(jnp.atleast_1d(x), 0, 0).sum() for x in jax.tree.leaves(to)]

    def tie(x):
        for zero in nothing:
            x = x + zero.astype(x.dtype)
        return x

    return jax.tree.map(tie, tree)
