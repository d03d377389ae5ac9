"""Reads a stack of bf16 or float16 layers one at a time, without widening the whole stack.

On CPUs, XLA converts a bf16 array to float32 to slice it: a scan over layers makes a float32 copy
of the whole stack, 1.8 GB for 28 layers of width 1024. It slices integers directly.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt16

from ..._jax.mapped_axes import vary_alike


def as_bits(stack: PyTree) -> PyTree:
    """The bits of each 16-bit array, to be scanned with `stack`; `None` for other leaves."""

    def bits(x):
        is_narrow = eqx.is_inexact_array(x) and jnp.finfo(x.dtype).bits == 16
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if is_narrow else None

    return jax.tree.map(bits, stack)


def from_bits(layer: PyTree, bits: PyTree, x: Array) -> PyTree:
    """One layer, with its 16-bit arrays read from their bits; gradients still flow to `layer`.

    `x` is the layer's input: under `shard_map` the gradients vary over the same mesh axes as `x`,
    so the parameters must vary over them, too.
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
