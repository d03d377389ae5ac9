"""Attention over a row with a `Layout`, block by block: the masks and the products.

A prompt attends to itself, and a completion to the prompt and to itself. The mask over the whole
row is never built.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from ..._arrays.layout import Layout
from ..._arrays.packed import PackedLayout
from ..._arrays.tokens import as_ids
from ..._jax.dtypes import at_least_float32
from . import kernels
from .attended import attended, attended_and_normaliser
from .attended_row import attended_row
from .basic_layers import dropout
from .blockwise import masked
from .config import Config
from .how import Form, How
from .parts import Widths, join, split

# Number of blocks of queries in a packed row. More blocks skip more keys that no query sees, but
# take longer to compile.
PACKED_BLOCKS = 4


class Masks(eqx.Module):
    """The attention mask of each block of a layout: true where a query (first) sees a key (second).

    **Arguments:**

    - `prompt`: the prompt's mask on itself; `None` for a plain causal mask, which fused kernels
        apply on their own. Shape `(prompt, prompt)`.
    - `completions`: for each run of completions of equal width, their mask on the prompt and, after
        it, on themselves. Each of shape `(completion, prompt + completion)`.
    """

    prompt: Bool[Array, "prompt prompt"] | None
    # `_`: the widths differ from run to run.
    completions: tuple[Bool[Array, "_ _"], ...]


def masks(layout: Layout | PackedLayout, window: int | None) -> Masks:
    """The masks of a layout for layers with this window; a packed row is one block."""
    if isinstance(layout, PackedLayout):
        near = visible(layout.positions, layout.positions, window)
        return Masks(layout.mask() & near, ())
    width, length = layout.prompt_width, layout.prompt_length
    prompt = jnp.arange(width).astype(length.dtype)
    real = prompt < length
    completions = []
    for _, _, completion in Widths(width, layout.completion_widths).runs:
        # Positions continue after the real tokens of the prompt, not after its padding.
        positions = length + jnp.arange(completion).astype(length.dtype)
        near = visible(positions, prompt, window)
        on_prompt = jnp.broadcast_to(real, (completion, width)) & near  # (completion, prompt)
        on_completion = visible(positions, positions, window)  # (completion, completion)
        completions.append(jnp.concatenate([on_prompt, on_completion], axis=1))
    on_itself = None if window is None else visible(prompt, prompt, window)
    return Masks(on_itself, tuple(completions))


def visible(
    query: Integer[Array, " query"], key: Integer[Array, " key"], window: int | None
) -> Bool[Array, "query key"]:
    """Whether each query's position sees each key's position: causal, and within the window."""
    # In int32: a difference of unsigned positions is never negative, so nothing would be masked.
    distance = as_ids(query)[:, None] - as_ids(key)[None, :]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def attend_by_layout(
    layout: Layout | PackedLayout,
    query: Float[Array, "length heads head_width"],
    key: Float[Array, "length key_heads head_width"],
    value: Float[Array, "length key_heads head_width"],
    masks: Masks,
    *,
    sinks: Float[Array, " heads"] | None = None,
    config: Config,
    rng: PRNGKeyArray | None,
) -> Float[Array, "length heads head_width"]:
    """Attention over a whole row, block by block."""
    if isinstance(layout, PackedLayout):
        return _attend_packed(
            layout, query, key, value, masks.prompt, sinks=sinks, config=config, rng=rng
        )
    widths = Widths(layout.prompt_width, layout.completion_widths)
    how = How(config.attention_scale, config.attention_softcap, "causal", config.fused)
    # A window gives the prompt a mask, too.
    is_plain = sinks is None and masks.prompt is None and config.dropout_rate("attention") == 0
    grouped = _grouped(query, key.shape[1])
    if is_plain and kernels.on_some_platform_for_rows(how, widths, grouped):
        length = layout.prompt_length
        output = attended_row(how, widths, grouped, key, value, length, masks.completions)
        return output.reshape(query.shape)
    prompt, *completions = split(widths, query, key, value)
    first, *rngs = _split(rng, 1 + len(completions))
    outputs = [attend(*prompt, masks.prompt, sinks=sinks, config=config, rng=first)]
    # A window hides other keys from each query.
    form: Form = "any" if any(config.windows) else "keys"
    for part, mask, rng in zip(completions, masks.completions, rngs, strict=True):
        outputs.append(attend(*part, mask, sinks=sinks, config=config, form=form, rng=rng))
    return join(outputs)


def _attend_packed(
    layout: PackedLayout,
    query: Float[Array, "length heads head_width"],
    key: Float[Array, "length key_heads head_width"],
    value: Float[Array, "length key_heads head_width"],
    mask: Any,  # (length, length) in bool; a packed row always has a mask
    *,
    sinks: Float[Array, " heads"] | None,
    config: Config,
    rng: PRNGKeyArray | None,
) -> Float[Array, "length heads head_width"]:
    """Attention over a packed row: blocks of queries, each on the keys that they can reach."""
    block = -(-layout.length // PACKED_BLOCKS)
    starts = range(0, layout.length, block)
    outputs = []
    for start, block_rng in zip(starts, _split(rng, len(starts)), strict=True):
        queries = slice(start, min(start + block, layout.length))
        first = max(start + 1 - layout.longest_pair, 0)
        keys = slice(first, queries.stop)
        parts = query[None, queries], key[None, keys], value[None, keys]
        seen = mask[queries, keys]
        outputs.append(attend(*parts, seen, sinks=sinks, config=config, rng=block_rng)[0])
    return jnp.concatenate(outputs)


def attend(
    query: Float[Array, "batch query heads head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    mask: Bool[Array, "query key"] | None,
    *,
    sinks: Float[Array, " heads"] | None = None,
    config: Config,
    form: Form = "any",
    rng: PRNGKeyArray | None = None,
) -> Float[Array, "batch query heads head_width"]:
    """Attention with grouped heads; causal without a mask.

    Scores and their softmax are in float32 or wider. Each head's sink is one more score of the
    softmax, without a value. `form` describes the mask, if there is one.
    """
    rng = rng if config.dropout_rate("attention") > 0 else None
    grouped = _grouped(query, key.shape[2])
    if rng is not None:
        seen = jnp.tri(query.shape[1], dtype=bool) if mask is None else mask
        return _dropped(grouped, key, value, sinks, seen, config, rng).reshape(query.shape)
    form = "causal" if mask is None else form
    how = How(config.attention_scale, config.attention_softcap, form, config.fused)
    if sinks is None:
        return attended(how, grouped, key, value, mask).reshape(query.shape)
    output, normaliser = attended_and_normaliser(how, grouped, key, value, mask)
    share = share_beside(sinks.reshape(*grouped.shape[2:4], 1), normaliser)
    return (output * share.astype(output.dtype)).reshape(query.shape)


def share_beside(
    sinks: Float[Array, "*heads"], normaliser: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The weight that a softmax leaves to the keys, beside a sink in each head.

    The trailing axes of `normaliser`, the logarithm of the sum over the keys, are those of `sinks`.
    """
    return jax.nn.sigmoid(
        normaliser - jnp.broadcast_to(sinks.astype(normaliser.dtype), normaliser.shape)
    )


def attend_parts(
    query: Float[Array, "1 heads head_width"],
    parts: Sequence[
        tuple[Float[Array, "kv _ width"], Float[Array, "kv _ width"], Bool[Array, "1 _"]]
    ],
    *,
    sinks: Float[Array, " heads"] | None = None,
    config: Config,
) -> Float[Array, "1 heads head_width"]:
    """Attention of one query over keys and values in several parts, which are not joined.

    **Arguments:**

    - `query`: shape `(1, heads, head_width)`.
    - `parts`: keys and values, each of shape `(key_heads, length, head_width)`, and a mask of shape
        `(1, length)`.
    - `sinks`: a score without a value for each head, or `None`.
    """
    key_heads, _, width = parts[0][0].shape
    grouped = query.reshape(key_heads, -1, width)
    scores, factors = zip(
        *(_scores_of_one(grouped, key, mask, config) for key, _, mask in parts), strict=True
    )  # each (1, key_heads, groups, 1, length)
    joined = factors[0] * jnp.concatenate(scores, axis=-1)
    weights = _weights(joined, sinks)[0, :, :, 0]  # (key_heads, groups, length)
    ends, wide = list(itertools.accumulate(x.shape[-1] for x in scores))[:-1], weights.dtype
    outputs = [
        jax.lax.dot_general(
            weight.astype(value.dtype),
            value,
            dimension_numbers=(([2], [1]), ([0], [0])),
            preferred_element_type=wide,
        )
        for (_, value, _), weight in zip(parts, jnp.split(weights, ends, axis=-1), strict=True)
    ]
    output = jnp.stack(outputs).sum(axis=0)  # (key_heads, groups, head_width)
    return output.astype(query.dtype).reshape(query.shape)


def _scores_of_one(
    query: Float[Array, "key_heads groups head_width"],
    key: Float[Array, "key_heads length head_width"],
    mask: Bool[Array, "1 length"],
    config: Config,
) -> tuple[Float[Array, "1 key_heads groups 1 length"], float]:
    """The scores of one query, and their factor, as from `masked`."""
    # Not an einsum, which may put the query first: XLA would then copy the keys to transpose them.
    products = jax.lax.dot_general(
        key,
        query,
        dimension_numbers=(([2], [2]), ([0], [0])),
        preferred_element_type=at_least_float32(query.dtype),
    )  # (key_heads, length, groups)
    products = jnp.swapaxes(products, 1, 2)[None, :, :, None]
    return masked(config.attention_scale, config.attention_softcap, products, mask)


def _dropped(
    query: Float[Array, "batch query key_heads groups head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    sinks: Float[Array, " heads"] | None,
    mask: Bool[Array, "query key"],
    config: Config,
    rng: PRNGKeyArray,
) -> Float[Array, "batch query key_heads groups head_width"]:
    """Attention with dropout of its weights."""
    scale, softcap = config.attention_scale, config.attention_softcap
    wide = at_least_float32(query.dtype)
    products = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=wide)
    scores, factor = masked(scale, softcap, products, mask)
    weights = dropout(_weights(factor * scores, sinks), config.dropout_rate("attention"), rng)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(value.dtype), value)


def _weights(
    scores: Float[Array, "batch key_heads groups query key"], sinks: Float[Array, " heads"] | None
) -> Float[Array, "batch key_heads groups query key"]:
    """The softmax of scores over the keys, beside the sinks if there are any."""
    weights = jax.nn.softmax(scores, axis=-1)
    if sinks is None:
        return weights
    normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    sinks = sinks.reshape(*scores.shape[1:3], 1, 1)
    return weights * jnp.broadcast_to(share_beside(sinks, normaliser), weights.shape)


def _grouped(
    query: Float[Array, "*batch heads head_width"], key_heads: int
) -> Float[Array, "*batch key_heads groups head_width"]:
    """Queries with the heads of a group, which share keys and values, along an axis."""
    return query.reshape(*query.shape[:-2], key_heads, -1, query.shape[-1])


def _split(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))
