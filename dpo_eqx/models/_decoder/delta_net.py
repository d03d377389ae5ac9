"""The layer of Qwen3.5 that replaces attention: projections, short filters, the gated delta rule.

`delta_rule.py` has the recurrence itself.
"""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..._jax.dtypes import at_least_float32
from ..._jax.rounding import rounded
from .basic_layers import ACTIVATIONS, Linear, Norm
from .config import Config
from .delta_rule import gated_delta_rule
from .links import Links
from .recurrence import Recurrence
from .short_conv import Filter

# Added to the squared length of queries and keys, whatever the epsilon of the norms.
EPS = 1e-6


class DeltaState(NamedTuple):
    """The state after a token: the histories of the filters, and the memory of each head."""

    query: Float[Array, "taps keys"]
    key: Float[Array, "taps keys"]
    value: Float[Array, "taps values"]
    memory: Float[Array, "heads key_width value_width"]


class DeltaNet(eqx.Module):
    r"""Gated DeltaNet: queries, keys and values are filtered, and a state replaces the scores.

    The decay of a token is $\exp(-e^{A} \mathrm{softplus}(d + b))$, with $d$ the output of `decay`,
    $A$ = `A_log` and $b$ = `dt_bias`. Its rate is the sigmoid of `rate`. What it reads is
    normalised in each head and multiplied by the `silu` of `gate`.

    **Arguments:**

    - `config`, `recurrence`: give the sizes. With `keys = key_heads * key_width` and
        `values = value_heads * value_width`, the weights of `query` and `key` have shape
        `(keys, width)`, those of `value` and `gate` `(values, width)`, those of `rate` and `decay`
        `(value_heads, width)`, and that of `output` `(width, values)`. `A_log` and `dt_bias` have
        shape `(value_heads,)`.
    - `key`: the random key of the initial weights.
    """

    query: Linear
    key: Linear
    value: Linear
    query_filter: Filter
    key_filter: Filter
    value_filter: Filter
    gate: Linear
    rate: Linear
    decay: Linear
    A_log: Float[Array, " value_heads"]
    dt_bias: Float[Array, " value_heads"]
    norm: Norm
    output: Linear
    key_heads: int = eqx.field(static=True)

    def __init__(self, config: Config, recurrence: Recurrence, *, key: PRNGKeyArray):
        keys, heads, kernel = jax.random.split(key, 11), recurrence.value_heads, recurrence.kernel
        of_keys = recurrence.key_heads * recurrence.key_width
        of_values = heads * recurrence.value_width

        def linear(out: int, index: int) -> Linear:
            return Linear(out, config.width, bias=False, scale=config.width**-0.5, key=keys[index])

        self.query, self.key = linear(of_keys, 0), linear(of_keys, 1)
        self.value, self.gate = linear(of_values, 2), linear(of_values, 3)
        self.rate, self.decay = linear(heads, 4), linear(heads, 5)
        self.query_filter = Filter(of_keys, kernel, bias=False, key=keys[6])
        self.key_filter = Filter(of_keys, kernel, bias=False, key=keys[7])
        self.value_filter = Filter(of_values, kernel, bias=False, key=keys[8])
        # As published: a state forgets at a rate of up to 16 for each unit of the softplus.
        self.A_log = jnp.log(jax.random.uniform(keys[9], (heads,), jnp.float32, 0.01, 16))
        self.dt_bias = jnp.ones(heads, jnp.float32)
        # Its weight has no offset, even in families whose other norms have one.
        self.norm = Norm(recurrence.value_width, dataclasses.replace(config, norm_offset=0.0))
        scale = (2 * config.layers * of_values) ** -0.5
        self.output = Linear(config.width, of_values, bias=False, scale=scale, key=keys[10])
        self.key_heads = recurrence.key_heads

    def __call__(
        self,
        x: Float[Array, "length width"],
        links: Links,
        state: DeltaState | None,
        *,
        config: Config,
    ) -> tuple[Float[Array, "length width"], DeltaState]:
        query, key, value, histories = self._filtered(x, links, state, config)
        wide, heads = at_least_float32(x.dtype), self.A_log.shape[0]
        query, key = (
            jnp.repeat(
                _unit(x.reshape(len(x), self.key_heads, -1)), heads // self.key_heads, axis=1
            )
            for x in (query, key)
        )  # (length, value_heads, key_width): neighbouring heads of values share a key
        value = value.reshape(len(x), heads, -1)
        rate = jax.nn.sigmoid(self.rate(x).astype(wide))
        bias = jnp.broadcast_to(self.dt_bias.astype(wide), rate.shape)
        speed = jnp.broadcast_to(jnp.exp(self.A_log.astype(wide)), rate.shape)
        log_decay = -speed * jax.nn.softplus(self.decay(x).astype(wide) + bias)
        query = query * key.shape[-1] ** -0.5
        memory = None if state is None else state.memory
        read, memory = gated_delta_rule(query, key, value, log_decay, rate, links, memory)
        gate = jax.nn.silu(self.gate(x).astype(wide))
        gated = self.norm(read).reshape(gate.shape) * gate
        return self.output(rounded(gated.astype(x.dtype))), DeltaState(*histories, memory=memory)

    def _filtered(
        self,
        x: Float[Array, "length width"],
        links: Links,
        state: DeltaState | None,
        config: Config,
    ) -> tuple[Array, Array, Array, tuple[Array, Array, Array]]:
        """Queries, keys and values after their filters, and the histories of the filters."""
        activation = ACTIVATIONS[config.activation]
        before = (None,) * 3 if state is None else state[:3]
        layers = (
            (self.query, self.query_filter),
            (self.key, self.key_filter),
            (self.value, self.value_filter),
        )
        outputs = [
            apply(project(x), links, history)
            for (project, apply), history in zip(layers, before, strict=True)
        ]
        wide = at_least_float32(x.dtype)
        query, key, value = (activation(y.astype(wide)) for y, _ in outputs)
        of_query, of_key, of_value = (history for _, history in outputs)
        return query, key, value, (of_query, of_key, of_value)


def _unit(x: Float[Array, "length heads width"]) -> Float[Array, "length heads width"]:
    """Each head divided by its length."""
    return x * jax.lax.rsqrt((x * x).sum(axis=-1, keepdims=True) + EPS)
