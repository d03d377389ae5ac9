"""One layer of a decoder: attention, feed-forward, their norms and the residual stream.

The caller's functions apply the mask and any cache. In hybrids, `short_conv.py` and `delta_net.py`
replace the attention of some layers.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..._jax.rounding import rounded
from .basic_layers import ACTIVATIONS, XIELU, Linear, Norm, dropout, scaled
from .config import Config
from .delta_net import DeltaNet
from .experts import RoutedFeedForward
from .rotary import Tables, rotate
from .short_conv import ShortConvolution

# Maps queries, keys, values and sinks of one layer to its output, and to a cache of any form.
Attend = Callable[[Array, Array, Array, Array | None], tuple[Array, Any]]
# Maps the normalised input of one layer to what its attention or recurrence adds, and to a cache.
Mix = Callable[[Array], tuple[Array, Any]]


class Attention(eqx.Module):
    """The projections of attention, with the norm and the rotation of each head if configured.

    **Arguments:**

    - `config`: gives the sizes, biases and norms. The weights of `query`, `key`, `value` and
        `output` have shapes `(heads * head_width, width)`, `(key_heads * head_width, width)`
        (twice) and `(width, heads * head_width)`; `gate` has the shape of `query`. `sinks` has
        shape `(heads,)`.
    - `key`: the random key of the initial weights.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    gate: Linear | None
    query_norm: Norm | None
    key_norm: Norm | None
    sinks: Float[Array, " heads"] | None

    def __init__(self, config: Config, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        inner, shared = config.heads * config.head_width, config.key_heads * config.head_width
        into = {"bias": config.query_bias, "scale": config.width**-0.5}
        self.query = Linear(inner, config.width, key=keys[0], **into)
        self.key = Linear(shared, config.width, key=keys[1], **into)
        self.value = Linear(shared, config.width, key=keys[2], **into)
        scale = (2 * config.layers * inner) ** -0.5
        self.output = Linear(config.width, inner, bias=config.output_bias, scale=scale, key=keys[3])
        # A key of its own, so that the other weights are the same with a gate and without.
        gate = Linear(inner, config.width, key=jax.random.fold_in(key, 4), **into)
        self.gate = gate if config.attention_gate else None
        self.query_norm = query_key_norm(config.heads, config)
        self.key_norm = query_key_norm(config.key_heads, config)
        self.sinks = jnp.zeros(config.heads, jnp.float32) if config.attention_sinks else None

    def __call__(
        self,
        x: Float[Array, "length width"],
        tables: Tables | None,
        attend: Attend,
        *,
        config: Config,
    ) -> tuple[Float[Array, "length width"], Any]:
        query, key, value = (
            project(x).reshape(x.shape[0], -1, config.head_width)
            for project in (self.query, self.key, self.value)
        )  # (length, heads, head_width), for keys and values (length, key_heads, head_width)
        if not config.query_key_norm_last:
            query, key = self._normalised(query, key, config)
        query, key, value = (clipped(x, config.projection_clip) for x in (query, key, value))
        if tables is not None:
            interleaved = config.rotary is not None and config.rotary.interleaved
            query, key = (rotate(x, tables, interleaved=interleaved) for x in (query, key))
            if tables.query_scale is not None:
                query = query * tables.query_scale.astype(query.dtype)[:, None, None]
            # Faster on a GPU: otherwise float32 would be written before the rotation, and read
            # again for each block of the layout.
            query, key = rounded((query, key))
        if config.query_key_norm_last:
            query, key = self._normalised(query, key, config)
        output, cache = attend(query, key, value, self.sinks)  # (length, heads, head_width)
        output = output.reshape(x.shape[0], -1)
        if self.gate is not None:
            output = rounded(output * jax.nn.sigmoid(self.gate(x)))
        return self.output(output), cache

    def _normalised(
        self,
        query: Float[Array, "length heads head_width"],
        key: Float[Array, "length key_heads head_width"],
        config: Config,
    ) -> tuple[
        Float[Array, "length heads head_width"], Float[Array, "length key_heads head_width"]
    ]:
        """Queries and keys after their norms, if there are any."""
        if self.query_norm is None or self.key_norm is None:
            return query, key
        if config.query_key_norm_axes != "all":
            return self.query_norm(query), self.key_norm(key)
        length = query.shape[0]
        whole_query = self.query_norm(query.reshape(length, -1))
        whole_key = self.key_norm(key.reshape(length, -1))
        return whole_query.reshape(query.shape), whole_key.reshape(key.shape)


def query_key_norm(heads: int, config: Config) -> Norm | None:
    """The norm of the queries or keys of this many heads, if there is one."""
    width = config.head_width
    shapes = {"head": (width,), "heads": (heads, width), "all": (heads * width,)}
    axes = config.query_key_norm_axes
    return Norm(shapes[axes], config, bias=axes != "heads") if config.query_key_norm else None


def clipped(x: Float[Array, "*shape"], largest: float | None) -> Float[Array, "*shape"]:
    """`x` clipped to an absolute value of at most `largest`."""
    return x if largest is None else jnp.clip(x, -largest, largest)


class FeedForward(eqx.Module):
    """A feed-forward block: `down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))`.

    **Arguments:**

    - `config`: gives the sizes, the activation, the biases, and whether there is a gate. The
        weights of `gate` and `up` have shape `(feed_forward, width)`, and `down` has
        `(width, feed_forward)`.
    - `key`: the random key of the initial weights.
    """

    gate: Linear | None
    up: Linear
    down: Linear
    activation: XIELU | None

    def __init__(self, config: Config, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        width, inner, bias = config.width, config.feed_forward, config.feed_forward_bias
        gate = Linear(inner, width, bias=bias, scale=width**-0.5, key=keys[0])
        self.gate = gate if config.gated else None
        self.up = Linear(inner, width, bias=bias, scale=width**-0.5, key=keys[1])
        scale = (2 * config.layers * inner) ** -0.5
        self.down = Linear(width, inner, bias=bias, scale=scale, key=keys[2])
        self.activation = XIELU() if config.activation == "xielu" else None

    def __call__(
        self, x: Float[Array, "length width"], *, config: Config
    ) -> Float[Array, "length width"]:
        activation = self.activation or ACTIVATIONS[config.activation]
        if self.gate is None:
            return self.down(activation(self.up(x)))
        # The barrier costs the forward pass nothing, and keeps XLA from computing the activation's
        # gradient several times over, in the layouts of the products that follow.
        gate, up = jax.lax.optimization_barrier((self.gate(x), self.up(x)))
        return self.down(activation(gate) * up)


class Layer(eqx.Module):
    """Attention and feed-forward on the residual stream, in sequence or in parallel.

    If `config` has layers of several kinds, it has the parts of all of them, and the caller chooses
    between them: attention or recurrence, and experts or a dense feed-forward block.

    **Arguments:**

    - `config`: gives the sizes and biases, and which norms there are. Each norm has parameters of
        shape `(width,)`.
    - `key`: the random key of the initial weights.
    """

    attention_norm: Norm | None
    attention: Attention | None
    recurrence: ShortConvolution | DeltaNet | None
    attention_post_norm: Norm | None
    feed_forward_norm: Norm | None
    feed_forward: FeedForward | RoutedFeedForward | None
    dense_feed_forward: FeedForward | None
    feed_forward_post_norm: Norm | None

    def __init__(self, config: Config, *, key: PRNGKeyArray):
        keys = jax.random.split(key)
        width, shared = config.width, config.parallel and not config.parallel_norms
        self.attention_norm = Norm(width, config) if config.pre_norms else None
        self.attention = Attention(config, key=keys[0]) if "attention" in config.mixers else None
        self.recurrence = recurrence_of(config, key=keys[0])
        self.attention_post_norm = Norm(width, config) if config.post_norms else None
        own = config.pre_norms and not shared
        self.feed_forward_norm = Norm(width, config) if own else None
        blocks = {block for _, block in config.kinds}
        block = RoutedFeedForward if config.experts else FeedForward
        self.feed_forward = block(config, key=keys[1]) if "feed_forward" in blocks else None
        # A key of its own, so that the experts are the same with dense layers and without.
        dense = FeedForward(config, key=jax.random.fold_in(keys[1], 1))
        self.dense_feed_forward = dense if "dense_feed_forward" in blocks else None
        self.feed_forward_post_norm = Norm(width, config) if config.post_norms else None

    def __call__(
        self,
        x: Float[Array, "length width"],
        mix: Mix,
        *,
        config: Config,
        block: str,
        key: PRNGKeyArray | None,
        observe: Callable[["Layer", Array], Any] | None = None,
    ) -> tuple[Float[Array, "length width"], Any]:
        keys = (None, None) if key is None else jax.random.split(key)
        rate = config.dropout_rate("residual")
        before = x
        normed = x if self.attention_norm is None else self.attention_norm(x)
        mixed, cache = mix(normed)
        if self.attention_post_norm is not None:
            mixed = self.attention_post_norm(mixed)
        x = x + dropout(scaled(mixed, config.residual_scale), rate, keys[0])
        if self.feed_forward_norm is not None:
            normed = self.feed_forward_norm(before if config.parallel else x)
        elif not config.parallel:
            normed = x
        # In a parallel layer without a second norm, the feed-forward reads attention's input.
        cache = cache if observe is None else observe(self, normed)
        fed = getattr(self, block)(normed, config=config)
        if self.feed_forward_post_norm is not None:
            fed = self.feed_forward_post_norm(fed)
        return x + dropout(scaled(fed, config.residual_scale), rate, keys[1]), cache


def recurrence_of(config: Config, *, key: PRNGKeyArray) -> ShortConvolution | DeltaNet | None:
    """What replaces attention in recurrent layers, if there are any."""
    if config.recurrence is None or "recurrence" not in config.mixers:
        return None
    kind = DeltaNet if config.recurrence.kind == "delta" else ShortConvolution
    return kind(config, config.recurrence, key=key)
