"""Rotary position embeddings: the frequencies of each kind, and the rotation of a head.

The frequencies are constants, computed while tracing, so that no filter selects them for training.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .config import Rotary


def tables(
    rotary: Rotary, head_width: int, positions: Int[Array, " length"], dtype: jnp.dtype
) -> tuple[Float[Array, "length half"], Float[Array, "length half"]]:
    """The cosines and sines of each position; `half` is half the rotated width."""
    frequencies = jnp.asarray(KINDS[rotary.kind](rotary, head_width), dtype)
    angles = positions.astype(dtype)[:, None] * frequencies[None, :]
    amplitude = jnp.asarray(rotary.amplitude, dtype)
    return amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)


def rotate(
    heads: Float[Array, "length heads head_width"],
    cos: Float[Array, "length half"],
    sin: Float[Array, "length half"],
) -> Float[Array, "length heads head_width"]:
    """Rotates the front of each head, its first half against its second, in the tables' dtype."""
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    front = heads[..., : 2 * half].astype(cos.dtype)
    first, second = front[..., :half], front[..., half:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(heads.dtype), heads[..., 2 * half :]], axis=-1)


def default(rotary: Rotary, head_width: int) -> np.ndarray:
    """The frequencies in radians per token, fastest first."""
    width = int(head_width * rotary.fraction)
    return 1.0 / rotary.theta ** (np.arange(0, width, 2) / width)


def linear(rotary: Rotary, head_width: int) -> np.ndarray:
    """All frequencies divided by the factor."""
    return default(rotary, head_width) / rotary.factor


def llama3(rotary: Rotary, head_width: int) -> np.ndarray:
    """Slow frequencies divided by the factor, fast ones unchanged, a linear blend in between."""
    frequencies = default(rotary, head_width)
    turns = rotary.original_length * frequencies / (2 * math.pi)
    unscaled = (turns - rotary.low_frequency) / (rotary.high_frequency - rotary.low_frequency)
    return _blend(frequencies, rotary.factor, unscaled)


def yarn(rotary: Rotary, head_width: int) -> np.ndarray:
    """Like `llama3`, but the blend is linear in the dimension, not in the frequency.

    ??? cite

        Peng et al., *YaRN: Efficient Context Window Extension of Large Language Models*, 2023
        (arXiv 2309.00071).
    """
    frequencies = default(rotary, head_width)
    width = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        scale = math.log(rotary.original_length / (turns * 2 * math.pi))
        return width * scale / (2 * math.log(rotary.theta))

    low, high = dimension(rotary.fast), dimension(rotary.slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    # An empty range would divide by zero; the published code widens it by the same number.
    high = high + 0.001 if high == low else high
    return _blend(frequencies, rotary.factor, 1 - (np.arange(width // 2) - low) / (high - low))


def _blend(frequencies: np.ndarray, factor: float, unscaled: np.ndarray) -> np.ndarray:
    """A mixture of the frequencies, with weight `unscaled`, and of those divided by `factor`."""
    unscaled = np.clip(unscaled, 0, 1)
    return unscaled * frequencies + (1 - unscaled) * frequencies / factor


KINDS = {"default": default, "linear": linear, "llama3": llama3, "yarn": yarn}
