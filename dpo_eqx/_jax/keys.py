"""Random keys: one for each pair of the global batch, independent of devices and microbatches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from .describe import described
from .mapped_axes import AxisName, own_rows

# One key or an array of keys, typed (`jax.random.key`) or of the older kind (`PRNGKey`).
Keys = Key[Array, "..."] | UInt32[Array, "..."]


def check_key(key: Any) -> None:
    """Raises if `key` is neither a JAX key nor an array of keys, for instance if it is a seed."""
    is_array = isinstance(key, jax.Array | np.ndarray)
    is_typed = is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    # A key of the older kind is a row of two numbers, or of four for `rbg`.
    is_raw = is_array and key.dtype == np.uint32 and key.shape[-1:] in {(2,), (4,)}
    if not (is_typed or is_raw):
        raise ValueError(
            "`key` must be a JAX key, as `jax.random.key(0)` makes one from a seed, or an array of "
            f"keys; got {described(key)}."
        )


def is_one_key(key: Keys) -> bool:
    """Whether `key` is a single key and not an array of keys."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == (0 if is_typed else 1)


def keys_per_pair(key: Keys | None, pairs: int) -> Keys | None:
    """One key for each pair: splits a single key, and returns an array of keys unchanged."""
    return None if key is None else keys_per_row(key, pairs, rows="pairs")


def keys_per_row(key: Keys, count: int, *, rows: str) -> Keys:
    """`keys_per_pair` for other rows than pairs; `rows` is their name in the error."""
    check_key(key)
    if is_one_key(key):
        return jax.random.split(key, count)
    if key.shape[0] != count:
        raise ValueError(
            f"`key` must be one key, or one for each of the {count} {rows}; got shape {key.shape}."
        )
    return key


def own_keys(key: Keys | None, pairs: int, axis_name: AxisName | None) -> Keys | None:
    """The keys of this device's pairs, from one key for each pair of the global batch.

    Keys that were already split with the batch, one for each pair of this device, are unchanged.
    """
    if key is not None:
        check_key(key)
    if key is None or axis_name is None or (not is_one_key(key) and key.shape[0] == pairs):
        return keys_per_pair(key, pairs)
    global_keys = keys_per_pair(key, pairs * jax.lax.axis_size(axis_name))
    return own_rows(global_keys, axis_name, pairs)
