"""Reads a sequence in parts: the methods `start` and `extend` of `Transformer`.

The state is a cache of keys and values, which grows, and the states of recurrent layers.
`decode.py` has a cache of fixed shapes, for loops.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from ..._arrays.layout import Layout
from ..._arrays.tokens import as_ids
from ..._jax.explicit_meshes import automatic
from .attention import attend, attend_by_layout, masks, visible
from .blocks import Caches
from .links import links_of


class Cache(eqx.Module):
    """What a `Transformer` keeps of the tokens that it has read.

    **Arguments:**

    - `layers`: the keys and the values of layers with attention, each of shape
        `(layers, length, key_heads, head_width)`, and the states of recurrent layers.
    - `positions`: the position of each token. Shape `(length,)`.
    - `is_real`: false for the padding of a prompt, which no later token sees. Shape `(length,)`.
    - `tokens`: the number of real tokens, which is the position of the next one.
    """

    layers: Caches
    positions: Int[Array, " length"]
    is_real: Bool[Array, " length"]
    tokens: Int[Array, ""]


def read_prompt(
    policy: Any,
    ids: Int[Array, " prompt"],
    length: Int[Array, ""],
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "prompt width"], Caches]:
    """The hidden states of a prompt of `length` real tokens, and what its layers keep."""
    layout = Layout(length, ids.size, ())

    def attend_and_keep(query, key, value, sinks, masks, cache, rng):
        output = attend_by_layout(
            layout, query, key, value, masks, sinks=sinks, config=policy.config, rng=rng
        )
        return output, (key, value)

    return policy.run(
        ids,
        layout.positions,
        attend_and_keep,
        lambda window: masks(layout, window),
        links=links_of(layout),
        key=key,
    )


@partial(automatic, like=1)
def start(
    policy: Any,
    ids: Integer[Array | np.ndarray, " length"],
    length: Integer[Array | np.ndarray, ""] | int,
    *,
    key: PRNGKeyArray | None = None,
) -> tuple[Cache, Float[Array, " width"]]:
    """Reads the first tokens of a sequence, for `RecurrentPolicy`; `extend` reads on.

    If positions are learned and are fewer than `length`, the hidden state is NaN.

    **Arguments:**

    - `ids`: token ids, integers of any dtype, padded on the right. Shape `(length,)`.
    - `length`: the number of real tokens, at least 1.
    - `key`: the random key of dropout; without it no dropout applies.

    **Returns:**

    The cache, and the normalised hidden state of the last real token.

    **Raises:**

    `ValueError` if `shares_prompts` is false for a sequence of this length.
    """
    _check_shares(policy, ids.size)
    length = as_ids(jnp.asarray(length))
    hidden, layers = read_prompt(policy, as_ids(ids), length, key)
    positions = jnp.arange(ids.size, dtype=length.dtype)
    cache = Cache(layers, positions, positions < length, length)
    return cache, _in_table(policy, hidden[length - 1][None], (length - 1)[None])[0]


@partial(automatic, like=2)
def extend(
    policy: Any,
    state: Cache,
    ids: Integer[Array | np.ndarray, " length"],
    *,
    key: PRNGKeyArray | None = None,
) -> tuple[Cache, Float[Array, "length width"]]:
    """Reads the next tokens of a sequence, after those that `state` is of.

    If positions are learned, the hidden states of tokens beyond them are NaN.

    **Arguments:**

    - `state`: from `start` or `extend`.
    - `ids`: token ids, integers of any dtype, without padding before a real token. Shape
        `(length,)`.
    - `key`: the random key of dropout; without it no dropout applies.

    **Returns:**

    The cache after `ids`, and the normalised hidden state of each token.

    **Raises:**

    `ValueError` if `shares_prompts` is false for a sequence of this length.
    """
    ids = as_ids(ids)
    _check_shares(policy, state.positions.size + ids.size)
    own = state.tokens + jnp.arange(ids.size, dtype=state.tokens.dtype)
    positions = jnp.concatenate([state.positions, own])
    is_real = jnp.concatenate([state.is_real, jnp.ones(ids.shape, bool)])

    def attend_to_all(query, key, value, sinks, mask, cache, rng):
        key, value = (jnp.concatenate(x) for x in zip(cache, (key, value), strict=True))
        parts = query[None], key[None], value[None], mask
        output = attend(*parts, sinks=sinks, config=policy.config, rng=rng)
        return output[0], (key, value)

    def mask_of(window):
        return visible(own, positions, window) & is_real[None]

    hidden, layers = policy.run(ids, own, attend_to_all, mask_of, caches=state.layers, key=key)
    cache = Cache(layers, positions, is_real, state.tokens + ids.size)
    return cache, _in_table(policy, hidden, own)


def _check_shares(policy: Any, longest: int) -> None:
    if not policy.shares_prompts(longest):
        raise ValueError(
            "The rotary embeddings of this policy depend on the number of tokens of the whole "
            f"sequence if they are more than {policy.config.length_limit}; got a sequence of up to "
            f"{longest}, read in parts. Read it at once by `policy(ids)`, or shorten it."
        )


def _in_table(
    policy: Any, hidden: Float[Array, "length width"], positions: Int[Array, " length"]
) -> Float[Array, "length width"]:
    """`hidden`, with NaN for tokens beyond the last learned position."""
    if policy.positions is None:
        return hidden
    return jnp.where((positions < policy.config.max_length)[:, None], hidden, jnp.nan)
