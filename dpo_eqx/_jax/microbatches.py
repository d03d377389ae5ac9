"""Splits a leading axis into equal parts with a stride, and merges them again.

Parts of neighbouring rows would lie on few devices under automatic partitioning, and all the other
devices would wait for them or compute them again.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .explicit_meshes import whole_unless_split

# A number, or a symbolic one in `jax.export`.
Size = Any


def split(tree: Any, parts: Size) -> Any:
    """Every array `(rows, ...)` as `(parts, rows // parts, ...)`: part `i` has rows `i::parts`."""

    def split_one(x):
        x = whole_unless_split(x, parts)
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split_one, tree)


def merge(tree: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def accumulate(
    function: Callable[[Any], tuple[Any, Any]], rows: Any, parts: int, zeros: Any
) -> tuple[Any, Any]:
    """Applies `function` to one part of `rows` after the other.

    **Returns:**

    The sum of its first results, which starts at `zeros`, and its second results, one for each
    row, in the order of `rows`.
    """
    if parts == 1:
        return function(rows)

    def add(sums, part):
        summand, per_row = function(part)
        return jax.tree.map(jnp.add, sums, summand), per_row

    sums, per_row = jax.lax.scan(add, zeros, split(rows, parts))
    return sums, merge(per_row)


def nearest_divisor(number: int, wanted: float) -> int:
    """The divisor of `number` whose ratio to `wanted` is nearest to 1."""
    divisors = (n for n in range(1, number + 1) if number % n == 0)
    return min(divisors, key=lambda n: abs(math.log(n / max(wanted, 1))))


def check_divides(microbatches: int, pairs: int) -> None:
    """Raises if `pairs` rows cannot be split into `microbatches` equal parts."""
    if microbatches < 1 or pairs % microbatches:
        raise ValueError(
            f"`microbatches` must be positive and divide the pairs of the batch (of this device's "
            f"part of it, under an axis name); got {microbatches} for {pairs} pairs. Pad the batch "
            "with pairs of weight 0."
        )
