"""The formats of weights in 8 or 4 bits: encoding and decoding.

All functions work on single matrices and on stacks of them. `quantize.py` chooses the weights.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8, UInt32

# The quantiles of a standard normal distribution, scaled to [-1, 1], with 0 among them.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCK = 64


class Int8Weight(eqx.Module):
    r"""A weight as 8-bit integers $q$ and one scale for each output, $w_{oi} \approx s_o q_{oi}$.

    $s_o = \max_i |w_{oi}| / 127$, and $q$ is rounded to the nearest, ties to even.

    **Arguments:**

    - `codes`: $q$, from -127 to 127. Shape `(*layers, out, in)`.
    - `scales`: the bits of $s$ in float32. Stored as integers, they are never selected for training
        or cast to a compute dtype. Shape `(*layers, out)`.
    - `dtype`: the dtype of the decoded weight.
    """

    codes: Int8[Array, "*layers out in"]
    scales: UInt32[Array, "*layers out"]
    dtype: Any = eqx.field(static=True)

    @staticmethod
    def encode(weight: Float[Array, "*layers out in"]) -> "Int8Weight":
        """Encodes the weight, rounded to the nearest code."""
        wide = weight.astype(jnp.float32)
        scales = jnp.abs(wide).max(axis=-1) / jnp.float32(127)
        codes = jnp.round(wide / _not_zero(scales)[..., None]).astype(jnp.int8)
        return Int8Weight(codes, _as_bits(scales), weight.dtype)

    def decode(self) -> Float[Array, "*layers out in"]:
        """The weight, in `dtype`."""
        wide = self.codes.astype(jnp.float32) * _from_bits(self.scales)[..., None]
        return wide.astype(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.codes.shape


class NF4Weight(eqx.Module):
    r"""A weight as 4-bit NormalFloats: $w_i \approx s_b v_{q_i}$ with a scale for each block.

    A block is 64 neighbours along the inputs; the last block of a row may be shorter. $s_b$ is the
    largest $|w|$ in the block. $v$ are sixteen fixed values, the quantiles of a normal
    distribution. $q_i$ is the index of the nearest of them, and of the lower one in a tie.

    **Arguments:**

    - `codes`: two $q$ per byte, the first in the upper half; rows are padded to whole blocks. Shape
        `(*layers, out, 32 * blocks)`.
    - `scales`: the bits of $s$ in float32. Stored as integers, they are never selected for training
        or cast to a compute dtype. Shape `(*layers, out, blocks)`.
    - `width`: the number of inputs of the weight.
    - `dtype`: the dtype of the decoded weight.

    ??? cite

        Dettmers et al., *QLoRA: Efficient Finetuning of Quantized LLMs*, 2023, section 3 and
        appendix E (arXiv 2305.14314). Differs: the scales are not quantised again.
    """

    codes: UInt8[Array, "*layers out bytes"]
    scales: UInt32[Array, "*layers out blocks"]
    width: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    @staticmethod
    def encode(weight: Float[Array, "*layers out in"]) -> "NF4Weight":
        """Encodes the weight block by block, rounded to the nearest codes."""
        *lead, width = weight.shape
        padding = [(0, 0)] * len(lead) + [(0, -width % BLOCK)]
        blocks = jnp.pad(weight.astype(jnp.float32), padding).reshape(*lead, -1, BLOCK)
        scales = jnp.abs(blocks).max(axis=-1)
        pairs = _nearest(blocks / _not_zero(scales)[..., None]).reshape(*lead, -1, 2)
        codes = (pairs[..., 0] << 4) | pairs[..., 1]
        return NF4Weight(codes, _as_bits(scales), width, weight.dtype)

    def decode(self) -> Float[Array, "*layers out in"]:
        """The weight, in `dtype`."""
        shifts = jnp.broadcast_to(jnp.array([4, 0], jnp.uint8), (*self.codes.shape, 2))
        codes = (self.codes[..., None] >> shifts) & jnp.uint8(15)
        values = jnp.asarray(NF4_VALUES, jnp.float32)[codes.astype(jnp.int32)]
        blocks = values.reshape(*self.scales.shape, BLOCK) * _from_bits(self.scales)[..., None]
        rows = blocks.reshape(*self.codes.shape[:-1], -1)
        return rows[..., : self.width].astype(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return (*self.codes.shape[:-1], self.width)


FORMATS = {"int8": Int8Weight, "nf4": NF4Weight}


def _nearest(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The index of the nearest of the sixteen values: the number of midpoints below `x`."""
    values = np.asarray(NF4_VALUES, np.float32)
    middles = (values[1:] + values[:-1]) / np.float32(2)
    code = jnp.zeros(x.shape, jnp.uint8)
    for middle in middles:
        code = code + (x > middle).astype(jnp.uint8)
    return code


def _not_zero(scales: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    # Avoids 0 / 0: zero weights get zero codes. A NaN scale stays, so that the result shows it.
    return jnp.where(scales == 0, jnp.ones_like(scales), scales)


def _as_bits(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _from_bits(bits: UInt32[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
