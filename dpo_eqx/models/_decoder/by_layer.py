"""What differs from layer to layer of the scan, chosen by arrays: masks and rotary tables.

Each distinct value is built once. The layers themselves are in `layer.py`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..._jax.dtypes import at_least_float32
from .config import Config, Rotary
from .rotary import Tables, no_rotation, tables

Kind = TypeVar("Kind")
# A function that picks the value of a layer, and its argument for each layer of the scan.
Choice = tuple[Callable[[Any], Any], Int[Array, " layers"] | None]


def choose_masks(masks_of: Callable[[int | None], Any], windows: tuple[int | None, ...]) -> Choice:
    """The masks of each layer, from its window."""
    if len(set(windows)) == 1:
        return by_layer(masks_of, windows)
    # An endless window in place of `None`, since only masks of one structure can be stacked.
    endless = int(jnp.iinfo(jnp.int32).max)
    return by_layer(masks_of, tuple(window or endless for window in windows))


def choose_tables(
    config: Config,
    positions: Int[Array, " length"],
    tokens: Int[Array, ""] | None,
    dtype: jnp.dtype,
) -> Choice:
    """The rotary tables of each layer; `None` if no layer rotates.

    If some layers do not rotate, their tables turn nothing, so that all can be stacked.
    """

    def of(rotary: Rotary) -> Tables:
        return tables(rotary, config.head_width, positions, tokens, at_least_float32(dtype))

    first = next((rotary for rotary in config.layer_rotaries if rotary is not None), None)
    if first is None:
        return (lambda which: None), None
    return by_layer(
        lambda rotary: no_rotation(of(first)) if rotary is None else of(rotary),
        config.layer_rotaries,
    )


def by_layer(build: Callable[[Kind], Any], kinds: tuple[Kind, ...]) -> Choice:
    """A function that picks the value that `build` returns for a layer, and its argument.

    If all layers are of one kind, the argument is `None`. Otherwise it is the number of the kind.
    """
    distinct = tuple(dict.fromkeys(kinds))
    if len(distinct) == 1:
        only = build(distinct[0])
        return lambda which: only, None
    stacked = jax.tree.map(lambda *built: jnp.stack(built), *map(build, distinct))
    which = jnp.asarray([distinct.index(kind) for kind in kinds], jnp.int32)
    return lambda which: jax.tree.map(lambda built: built[which], stacked), which
