"""The ways to run a policy on the rows of a batch: all at once by `vmap`, or one after the other.

`predict.py` says what is run on each row.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

How = Literal["vmap", "map", "batch"]


def check_how(how: str, known: tuple[str, ...] = get_args(How)) -> None:
    """Raises `ValueError` if `how` is not one of the `known` words."""
    if how not in known:
        raise ValueError(f"`how` must be one of {', '.join(map(repr, known))}; got {how!r}.")


def over_rows(
    function: Callable[..., Any], how: How, axes: tuple[str, ...] | None = None
) -> Callable[..., Any]:
    """`function` of one row as a function of all rows, which are the first axis of its arguments.

    `axes` are the axes of a mesh over which `vmap` splits the rows. A loop has no such axes.
    """
    if how == "map":
        return lambda *rows: jax.lax.map(lambda row: function(*row), rows)
    return jax.vmap(function, spmd_axis_name=axes)
