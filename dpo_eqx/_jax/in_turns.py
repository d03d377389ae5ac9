"""A `vmap` that runs a few calls at a time, for platforms where that is faster."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .microbatches import nearest_divisor


def in_turns(
    run: Callable[..., Any], most: float, in_axes: Sequence[int | None], out_axes: int = 0
) -> Callable[..., Any]:
    """`jax.vmap(run, in_axes, out_axes)`, which runs about `most` of the calls at once.

    It runs as many as the nearest divisor of the number of calls, and all if `most` is infinite. Do
    not differentiate it: the loop would keep the residuals of all calls.
    """
    axes = tuple(None if axis is None else 0 for axis in in_axes)
    all_at_once, some_at_once = jax.vmap(run, tuple(in_axes), out_axes), jax.vmap(run, axes)

    def mapped(*operands: Array) -> Any:
        split = [(x, axis) for x, axis in zip(operands, in_axes, strict=True) if axis is not None]
        calls = split[0][0].shape[split[0][1]]
        # It is symbolic in `jax.export`.
        turns = nearest_divisor(calls, calls / most) if isinstance(calls, int) else 1
        if turns == 1:
            return all_at_once(*operands)

        def of_turns(x, axis):
            x = jnp.moveaxis(x, axis, 0)
            return x.reshape(turns, calls // turns, *x.shape[1:])

        def turn(own):
            given = iter(own)
            pairs = zip(operands, axes, strict=True)
            return some_at_once(*(x if axis is None else next(given) for x, axis in pairs))

        results = jax.lax.map(turn, [of_turns(x, axis) for x, axis in split])
        return jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(calls, *x.shape[2:]), 0, out_axes), results
        )

    return mapped
