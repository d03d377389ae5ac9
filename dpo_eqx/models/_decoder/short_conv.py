"""Causal convolutions over a few tokens, and the gated layer of LFM2 that is made of one.

`links.py` says which tokens come before a token; nothing here knows a layout.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..._jax.dtypes import at_least_float32
from ..._jax.mapped_axes import vary_alike
from ..._jax.rounding import rounded
from .basic_layers import Linear
from .config import Config
from .links import Links
from .recurrence import Recurrence


class Filter(eqx.Module):
    """A causal convolution of each channel on its own.

    **Arguments:**

    - `channels`: the number of channels.
    - `kernel`: the number of tokens that it sees, its own token included. `weight` has shape
        `(channels, 1, kernel)` as in a checkpoint; the last entry is for the token itself.
    - `bias`: whether to add a bias, of shape `(channels,)`, zero at first.
    - `key`: the random key of the initial weight.
    """

    weight: Float[Array, "channels 1 kernel"]
    bias: Float[Array, " channels"] | None

    def __init__(self, channels: int, kernel: int, *, bias: bool, key: PRNGKeyArray):
        shape = (channels, 1, kernel)
        self.weight = kernel**-0.5 * jax.random.normal(key, shape, jnp.float32)
        self.bias = jnp.zeros(channels, jnp.float32) if bias else None

    def __call__(
        self,
        x: Float[Array, "length channels"],
        links: Links,
        history: Float[Array, "taps channels"] | None,
    ) -> tuple[Float[Array, "length channels"], Float[Array, "taps channels"]]:
        """The filtered channels, and the inputs that the next token needs.

        **Arguments:**

        - `x`: the channels of each token. Shape `(length, channels)`.
        - `links`: which token follows which.
        - `history`: the inputs of the `kernel - 1` tokens before the row, oldest first; `None` for
            none, which counts as zeros.
        """
        taps = self.weight.shape[-1] - 1
        zeros = vary_alike(jnp.zeros((taps, x.shape[1]), x.dtype), x)[0]
        rows = jnp.concatenate(
            [zeros if history is None else history, x]
        )  # a token at place `i` is in row `i + taps`
        # In float32 or wider, so that policy and reference round at the same places.
        wide = at_least_float32(x.dtype)
        weight = self.weight[:, 0].astype(wide).T  # (kernel, channels)
        place, y = jnp.arange(x.shape[0], dtype=jnp.int32), jnp.zeros(x.shape, wide)
        for lag in range(taps + 1):
            tap = jnp.broadcast_to(weight[taps - lag], x.shape)
            y = y + rows[place + taps].astype(wide) * tap
            place = before(place, links)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias.astype(wide), y.shape)
        return rounded(y.astype(x.dtype)), self._next_history(rows, links)

    def _next_history(
        self, rows: Float[Array, "rows channels"], links: Links
    ) -> Float[Array, "taps channels"]:
        """The inputs of the last real token and of those before it, oldest first."""
        taps = self.weight.shape[-1] - 1
        places = jnp.arange(links.segments.size, dtype=jnp.int32)
        place = jnp.where(links.is_real, places, -1).max()
        newest_first = []
        for _ in range(taps):
            newest_first.append(place)
            place = before(place, links)
        oldest_first = jnp.asarray(newest_first[::-1], jnp.int32)
        return rows[oldest_first + taps]


def before(place: Int[Array, "*shape"], links: Links) -> Int[Array, "*shape"]:
    """The places of the tokens before these; -1, -2, ... before the row."""
    return jnp.where(place >= 0, links.parents[jnp.maximum(place, 0)], place - 1)


class ShortConvolution(eqx.Module):
    """A gated short convolution: `output(output_gate(x) * filter(input_gate(x) * value(x)))`.

    Its state is the history of the filter.

    **Arguments:**

    - `config`: gives the width, the kernel and whether there are biases. All projections have
        weights of shape `(width, width)`.
    - `key`: the random key of the initial weights.
    """

    input_gate: Linear
    output_gate: Linear
    value: Linear
    filter: Filter
    output: Linear

    def __init__(self, config: Config, recurrence: Recurrence, *, key: PRNGKeyArray):
        keys, width, bias = jax.random.split(key, 5), config.width, recurrence.bias
        into = {"bias": bias, "scale": width**-0.5}
        self.input_gate = Linear(width, width, key=keys[0], **into)
        self.output_gate = Linear(width, width, key=keys[1], **into)
        self.value = Linear(width, width, key=keys[2], **into)
        self.filter = Filter(width, recurrence.kernel, bias=bias, key=keys[3])
        scale = (2 * config.layers * width) ** -0.5
        self.output = Linear(width, width, bias=bias, scale=scale, key=keys[4])

    def __call__(
        self,
        x: Float[Array, "length width"],
        links: Links,
        state: Float[Array, "taps width"] | None,
        *,
        config: Config,
    ) -> tuple[Float[Array, "length width"], Float[Array, "taps width"]]:
        gated = rounded(self.input_gate(x) * self.value(x))
        filtered, state = self.filter(gated, links, state)
        return self.output(rounded(self.output_gate(x) * filtered)), state
