"""Rotary position embeddings: the frequencies of each kind, and the rotation of a head.

The frequencies are constants, computed while tracing, so that no filter selects them for training.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .config import Rotary


class Tables(eqx.Module):
    """The cosines and sines of each position, and the factor of its query if there is one.

    `half` is half the rotated width.
    """

    cos: Float[Array, "length half"]
    sin: Float[Array, "length half"]
    query_scale: Float[Array, " length"] | None


def tables(
    rotary: Rotary,
    head_width: int,
    positions: Int[Array, " length"],
    tokens: Int[Array, ""] | None,
    dtype: jnp.dtype,
) -> Tables:
    """The tables of a row.

    **Arguments:**

    - `positions`: the position of each token. Shape `(length,)`.
    - `tokens`: the number of real tokens of the sequence; `None` if it is at most `rotary.limit`.
    - `dtype`: the dtype of the tables.
    """
    if rotary.limit is None or tokens is None:
        frequencies = jnp.asarray(KINDS[rotary.kind](rotary, head_width), dtype)
    else:
        frequencies = BY_LENGTH[rotary.kind](rotary, head_width, tokens, dtype)
    angles = positions.astype(dtype)[:, None] * frequencies[None, :]
    amplitude = jnp.asarray(rotary.amplitude, dtype)
    cos, sin = amplitude * jnp.cos(angles), amplitude * jnp.sin(angles)
    return Tables(cos, -sin if rotary.reverse else sin, _query_scale(rotary, positions, dtype))


def no_rotation(like: Tables) -> Tables:
    """Tables that leave each head as it is, in the form of `like`."""
    scale = None if like.query_scale is None else jnp.ones_like(like.query_scale)
    return Tables(jnp.ones_like(like.cos), jnp.zeros_like(like.sin), scale)


def _query_scale(
    rotary: Rotary, positions: Int[Array, " length"], dtype: jnp.dtype
) -> Float[Array, " length"] | None:
    if rotary.query_growth == 0:
        return None
    turns = (positions // rotary.original_length).astype(dtype)
    return 1 + jnp.asarray(rotary.query_growth, dtype) * jnp.log1p(turns)


def rotate(
    heads: Float[Array, "length heads head_width"], tables: Tables, *, interleaved: bool
) -> Float[Array, "length heads head_width"]:
    """Rotates the front of each head, in the tables' dtype: one half of it against the other.

    The halves are the front's first and second half, or its even and odd places if `interleaved`.
    """
    half = tables.cos.shape[-1]
    cos, sin = tables.cos[:, None], tables.sin[:, None]
    front = heads[..., : 2 * half].astype(cos.dtype)
    if interleaved:
        first, second = front[..., ::2], front[..., 1::2]
    else:
        first, second = front[..., :half], front[..., half:]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        rotated = jnp.stack(turned, axis=-1).reshape(front.shape)
    else:
        rotated = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([rotated.astype(heads.dtype), heads[..., 2 * half :]], axis=-1)


def default(rotary: Rotary, head_width: int) -> np.ndarray:
    """The frequencies in radians per token, fastest first."""
    # Exponents are divided by the width before it is rounded up.
    width = rotary.stated_width(head_width)
    return 1.0 / rotary.theta ** (np.arange(0, width, 2) / width)


def linear(rotary: Rotary, head_width: int) -> np.ndarray:
    """All frequencies divided by the factor."""
    return default(rotary, head_width) / rotary.factor


def proportional(rotary: Rotary, head_width: int) -> np.ndarray:
    """The frequencies of a whole head, of which only the fastest part turns; divided by the factor.

    The two halves of the head are rotated against each other, so the part that does not turn is at
    the end of each half.
    """
    frequencies = 1.0 / rotary.theta ** (np.arange(0, head_width, 2) / head_width)
    turning = int(rotary.fraction * head_width // 2)
    return np.where(np.arange(head_width // 2) < turning, frequencies, 0.0) / rotary.factor


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


def short(rotary: Rotary, head_width: int) -> np.ndarray:
    """LongRoPE's frequencies in sequences of at most `original_length` tokens.

    ??? cite

        Ding et al., *LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens*, 2024 (arXiv
        2402.13753).
    """
    return default(rotary, head_width) / np.asarray(rotary.short_factors)


def longrope(
    rotary: Rotary, head_width: int, tokens: Int[Array, ""], dtype: jnp.dtype
) -> Float[Array, " half"]:
    """LongRoPE's frequencies in a sequence of any length."""
    long = default(rotary, head_width) / np.asarray(rotary.long_factors)
    is_long = tokens > rotary.original_length
    return jnp.where(
        is_long, jnp.asarray(long, dtype), jnp.asarray(short(rotary, head_width), dtype)
    )


def dynamic(
    rotary: Rotary, head_width: int, tokens: Int[Array, ""], dtype: jnp.dtype
) -> Float[Array, " half"]:
    """The base grows with the sequence, so that its slowest wave always covers `factor` times it.

    With the width $d$ and the growth $g$, the base is multiplied by $g^{d / (d - 2)}$: the
    frequency $i$ is divided by $g^{2i / (d - 2)}$.
    """
    frequencies = default(rotary, head_width)
    length = jnp.maximum(tokens, rotary.original_length).astype(dtype)
    growth = rotary.factor * length / rotary.original_length - (rotary.factor - 1)
    exponents = 2 * np.arange(len(frequencies)) / max(rotary.stated_width(head_width) - 2, 1)
    return jnp.asarray(frequencies, dtype) / growth ** jnp.asarray(exponents, dtype)


# The kinds in sequences of at most `limit` tokens, and those that depend on the length in longer
# ones.
KINDS: dict[str, Callable[[Rotary, int], np.ndarray]] = {
    "default": default,
    "linear": linear,
    "llama3": llama3,
    "yarn": yarn,
    "proportional": proportional,
    "dynamic": default,
    "longrope": short,
}
BY_LENGTH = {"dynamic": dynamic, "longrope": longrope}
