"""Layers of a stack in bf16 or float16, read one at a time without widening the whole stack.

On CPUs XLA slices a bf16 array by way of float32: for a scanned stack it makes a float32 copy of
all layers, 1.8 GB for 28 layers of width 1024. Integers it slices as they are.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt16

from ..._jax.mapped_axes import vary_alike


def as_bits(stack: PyTree) -> PyTree:
    """The bits of every narrow array, to be scanned over beside `stack`; `None` for the others."""

    def bits(x):
        is_narrow = eqx.is_inexact_array(x) and jnp.finfo(x.dtype).bits == 16
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if is_narrow else None

    return jax.tree.map(bits, stack)


def from_bits(layer: PyTree, bits: PyTree, x: Array) -> PyTree:
    """One layer, its narrow arrays read from their bits; gradients go to `layer` all the same.

    `x` is what the layer is going to be applied to: under `shard_map` the gradients vary as it
    does, and so must the parameters.
    """

    def read(array, bits):
        return array if bits is None else _read(*vary_alike(array, bits, x)[:2])

    return jax.tree.map(read, layer, bits, is_leaf=lambda leaf: leaf is None)


@jax.custom_jvp
def _read(array: Float[Array, "*shape"], bits: UInt16[Array, "*shape"]) -> Array:
    return jax.lax.bitcast_convert_type(bits, array.dtype)


@_read.defjvp
def _read_jvp(primals, tangents):
    return _read(*primals), tangents[0]
