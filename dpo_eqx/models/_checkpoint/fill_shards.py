"""Fills arrays from a file, tensor by tensor, directly on their devices.

The caller passes a function that reads; nothing here depends on checkpoints.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .folder import DTYPES
from .tensor_names import Index

Sharding = jax.sharding.Sharding


def leaf_dtype(dtype: Any, stored: list[str]) -> np.dtype:
    """The dtype of a leaf: `dtype` if given, else the widest of the stored dtypes."""
    kinds = {DTYPES[name] for name in stored}
    # Layers of different dtypes share one array: float32 holds both float16 and bfloat16.
    mixed = "float64" if "float64" in kinds else "float32"
    wanted = jnp.dtype(dtype or (mixed if len(kinds) > 1 else kinds.pop()))
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError(
            "`dtype` is float64, which JAX supports only if `jax_enable_x64` is set; set it, or "
            "choose `dtype=jnp.float32`."
        )
    return wanted


def fill(
    leaf: jax.ShapeDtypeStruct,
    sharding: Sharding | None,
    stacked: bool,
    read: Callable[[int, Index], np.ndarray],
) -> Array:
    """An array with each device's shard read on its own, layer by layer if layers are stacked."""
    if sharding is None:
        full_index = tuple((0, size) for size in leaf.shape)
        return _fill_shard(leaf.dtype, full_index, None, stacked, read)
    shards = [
        _fill_shard(leaf.dtype, _bounds(index or (), leaf.shape), device, stacked, read)
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)


def fill_encoded(
    like: PyTree,
    places: Sequence[Sharding | None],
    read: Callable[[int], np.ndarray],
    encode: Callable[[Array], PyTree],
) -> PyTree:
    """Encodes layer by layer into stacked arrays, with one tensor in memory at a time.

    **Arguments:**

    - `like`: the result of `encode`, as shapes and dtypes with a leading axis of layers.
    - `places`: a sharding for each leaf of `like`, or `None`.
    - `read`: returns the whole tensor of a layer.
    - `encode`: encodes the tensor of one layer.
    """
    shapes, treedef = jax.tree.flatten(like)
    stacks = [
        jnp.zeros(shape.shape, shape.dtype, device=place)
        for shape, place in zip(shapes, places, strict=True)
    ]
    encode = jax.jit(encode)
    for layer in range(shapes[0].shape[0]):
        parts = jax.tree.leaves(encode(read(layer)))
        for i, part in enumerate(parts):
            # By way of the host, since the stack may be on other devices.
            stacks[i] = _set(stacks[i], layer, np.asarray(part)).block_until_ready()
    placed = [jax.device_put(stack, place) for stack, place in zip(stacks, places, strict=True)]
    return jax.tree.unflatten(treedef, placed)


def _fill_shard(
    dtype: np.dtype,
    index: Index,
    device: jax.Device | None,
    stacked: bool,
    read: Callable[[int, Index], np.ndarray],
) -> Array:
    if not stacked:
        return jax.device_put(jnp.asarray(read(0, index).astype(dtype, copy=False)), device)
    (first, last), *other_axes = index
    shape = tuple(stop - start for start, stop in index)
    stack = jnp.zeros(shape, dtype, device=device)
    for layer in range(first, last):
        tensor = read(layer, tuple(other_axes)).astype(dtype, copy=False)
        # Wait: otherwise several tensors would be in memory at once.
        stack = _set(stack, layer - first, jax.device_put(tensor, device)).block_until_ready()
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _set(stack: Array, layer: Int[Array, ""], tensor: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(stack, tensor, layer, 0)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Index:
    bounds = (part.indices(size) for part, size in zip(index, shape, strict=True))
    return tuple((start, stop) for start, stop, _ in bounds)
