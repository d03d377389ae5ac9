"""Linear maps with a transpose of their own, differentiable to any order and in both modes.

A `custom_vjp` has no forward mode. A `custom_jvp` has, and reverse mode transposes its tangent;
that transpose is given here instead of derived.
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
    derivatives, in what `push` closes over, come from the code of `push`.

    With $L$ for `push`, the result is $y$ of the triangular system $u = x$, $y - L u = 0$, to which
    `custom_linear_solve` gives all derivatives. `jax.custom_derivatives.linear_call` says it more
    directly, but has neither `vmap` nor a derivative in what it closes over.

    **Arguments:**

    - `push`: linear in its argument, a pytree of arrays. Bodies of loops are `per_tile`.
    - `pull`: its transpose. From the cotangents of the result it gives one array for each of
        `operands`, of the same shape and dtype.
    - `operands`: a pytree of arrays, which vary over the same mapped axes.
    - `like`: a pytree of arrays of the shapes and dtypes of the result.
    """

    def system(unknowns):
        given, result = unknowns
        # Tied both ways, for the transposed system is differentiated, too.
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


# For the bodies of loops in `push`. The transpose that JAX derives would otherwise compute all that
# does not depend on the operands first, for all tiles together: all logits, all scores.
per_tile = partial(jax.checkpoint, prevent_cse=False)


def moving(tangents: Any) -> Any:
    """The tangents of a `defjvp(..., symbolic_zeros=True)`, with `None` for those that are zero."""
    return jax.tree.map(
        lambda x: None if isinstance(x, SymbolicZero) else x,
        tangents,
        is_leaf=lambda x: isinstance(x, SymbolicZero),
    )


def sum_parts(tree: Any, axis_name: str | None, like: Array) -> Any:
    """The sum over a mapped axis of what each device adds, whose cotangents all devices hold.

    `shard_map` with `check_vma=True`, where `like` varies over the axis, transposes a sum rightly.
    Elsewhere JAX transposes a sum to a sum, which is too large here: all devices compute the same
    from the result.
    """
    if axis_name is None or axis_name in varying_axes(like):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)
    return with_transpose(lambda x: jax.lax.psum(x, axis_name), lambda x: x, tree, tree)


def share(tree: Any, axis_name: str | None, like: Array) -> Any:
    """What all devices hold alike, for each to use in its own way: their cotangents are summed.

    Does nothing where `shard_map` tracks what varies: the cast in `vary_alike` does it then.
    """
    if axis_name is None or axis_name in varying_axes(like):
        return tree
    return with_transpose(lambda x: x, lambda x: jax.lax.psum(x, axis_name), tree, tree)


def _tied(tree: Any, to: Any) -> Any:
    """`tree`, as if each of its arrays depended on all arrays of `to`.

    JAX transposes a linear solve only if all of its right-hand side depends on what is
    differentiated. The sum of no entries is 0, and XLA leaves nothing of it.
    """
    nothing = [jax.lax.slice_in_dim(jnp.atleast_1d(x), 0, 0).sum() for x in jax.tree.leaves(to)]

    def tie(x):
        for zero in nothing:
            x = x + zero.astype(x.dtype)
        return x

    return jax.tree.map(tie, tree)
