"""Attention of a row made as a `Layout` says, block by block: who sees whom, and the products.

A prompt attends to itself, a completion to the prompt and to itself; the mask over the whole row
is never built.
"""

import itertools
from collections.abc import Iterator
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..axis import vary_alike
from ..layout import Layout
from ..log_probs import at_least_float32
from ..strided import nearest_divisor
from .config import Config
from .pieces import dropout

# The name by which a policy of `jax.checkpoint` may keep what attention's backward pass needs.
ATTENDED = "attended"
# Scores of one row held at once; there are as many rows as pairs. On a CPU what fits its cache,
# elsewhere 64 MiB of float32.
SCORES_AT_ONCE = {"cpu": 2**19}
SCORES_AT_ONCE_ELSEWHERE = 2**24


class Masks(eqx.Module):
    """Who sees whom in each block of a layout: true where a query, first, sees a key, second.

    `prompt` is `None` where it is plainly causal, which fused kernels know how to do without a
    mask. `completions` has one entry for each run of completions of equal width: their mask on
    the prompt and, after it, on themselves.
    """

    prompt: Bool[Array, "prompt prompt"] | None
    # Each has widths of its own.
    completions: tuple[Bool[Array, "_ _"], ...]


def masks(layout: Layout, window: int | None) -> Masks:
    """The masks of a layout for layers of one window."""
    width, length = layout.prompt_width, layout.prompt_length
    prompt = jnp.arange(width).astype(length.dtype)
    real = prompt < length
    completions = []
    for _, _, completion in _runs(layout):
        own = length + jnp.arange(completion).astype(length.dtype)
        on_prompt = jnp.broadcast_to(real, (completion, width)) & visible(own, prompt, window)
        completions.append(jnp.concatenate([on_prompt, visible(own, own, window)], axis=1))
    on_itself = None if window is None else visible(prompt, prompt, window)
    return Masks(on_itself, tuple(completions))


def visible(
    query: Int[Array, " query"], key: Int[Array, " key"], window: int | None
) -> Bool[Array, "query key"]:
    """Whether the token at each query's position sees the one at each key's position."""
    distance = query[:, None] - key[None, :]
    causal = distance >= 0
    return causal if window is None else causal & (distance < window)


def attend_by_layout(
    layout: Layout,
    query: Float[Array, "length heads head_width"],
    key: Float[Array, "length key_heads head_width"],
    value: Float[Array, "length key_heads head_width"],
    masks: Masks,
    *,
    config: Config,
    rng: PRNGKeyArray | None,
) -> Float[Array, "length heads head_width"]:
    """Attention over a whole row, block by block."""
    width = layout.prompt_width
    keys = iter(_split(rng, 1 + len(masks.completions)))
    prompt_key, prompt_value = key[None, :width], value[None, :width]
    outputs = [
        attend(
            query[None, :width],
            prompt_key,
            prompt_value,
            masks.prompt,
            config=config,
            rng=next(keys),
        )[0]
    ]
    for (start, count, completion), mask in zip(_runs(layout), masks.completions, strict=True):
        own_query, own_key, own_value = (
            x[start : start + count * completion].reshape(count, completion, *x.shape[1:])
            for x in (query, key, value)
        )
        output = attend(
            own_query,
            _behind(prompt_key, own_key),
            _behind(prompt_value, own_value),
            mask,
            config=config,
            rng=next(keys),
        )
        outputs.append(output.reshape(-1, *output.shape[2:]))
    return jnp.concatenate(outputs)


def attend(
    query: Float[Array, "batch query heads head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    mask: Bool[Array, "query key"] | None,
    *,
    config: Config,
    rng: PRNGKeyArray | None = None,
) -> Float[Array, "batch query heads head_width"]:
    """Attention of grouped heads; causal where there is no mask.

    Scores and their softmax are float32 or wider. Where nothing is dropped the backward pass
    computes the weights again from each query's normaliser: to keep them costs more, in memory
    and in time.
    """
    if mask is None:
        mask = jnp.tri(query.shape[1], dtype=bool)
    groups = query.shape[2] // key.shape[2]
    grouped = query.reshape(*query.shape[:2], key.shape[2], groups, query.shape[3])
    if rng is not None and config.attention_dropout > 0:
        output = _dropped(grouped, key, value, mask, config, rng)
    else:
        scale, softcap = config.attention_scale, config.attention_softcap
        output: Array = _attention(scale, softcap, grouped, key, value, mask)
    return output.reshape(query.shape)


def _dropped(query, key, value, mask, config: Config, rng: PRNGKeyArray):
    """Attention some of whose weights are zero."""
    scores = _scores(config.attention_scale, config.attention_softcap, query, key, mask)
    weights = dropout(jax.nn.softmax(scores, axis=-1), config.attention_dropout, rng)
    return jnp.einsum("bkgts,bskh->btkgh", weights.astype(value.dtype), value)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    scale: float,
    softcap: float | None,
    query: Float[Array, "batch query key_heads groups head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    mask: Bool[Array, "query key"],
) -> Float[Array, "batch query key_heads groups head_width"]:
    return _attention_forward(scale, softcap, query, key, value, mask)[0]


def _attention_forward(scale, softcap, query, key, value, mask):
    """The output, and as residuals no more than it and the normaliser of each query's scores."""
    count = _block_count(query, key)

    def block(operands):
        query, mask = operands
        scores = _scores(scale, softcap, query, key, mask)
        peak = jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - peak)
        total = jnp.moveaxis(weights.sum(axis=-1, keepdims=True), 3, 1)
        product = _product("bkgts,bskh->btkgh", weights.astype(value.dtype), value)
        return (product / total).astype(value.dtype), jnp.moveaxis(peak, 3, 1) + jnp.log(total)

    blocks = jax.lax.map(block, (_blocks(query, count, 1), _blocks(mask, count, 0)))
    output, normaliser = checkpoint_name([_unblocked(x) for x in blocks], ATTENDED)
    return output, (query, key, value, mask, output, normaliser)


def _attention_backward(scale, softcap, residuals, cotangent):
    r"""With $P$ the weights and $O$ the output, the slope in a score is $P (dO V^T - dO \cdot O)$.

    ??? cite

        Dao, *FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning*,
        2023 (arXiv 2307.08691), section 3.1.2.
    """
    query, key, value, mask, output, normaliser = residuals
    wide, narrow = normaliser.dtype, query.dtype
    mean = (cotangent.astype(wide) * output.astype(wide)).sum(axis=-1, keepdims=True)

    def block(sums, operands):
        query, cotangent, mean, normaliser, mask = operands
        scores = _scores(scale, softcap, query, key, mask)
        weights = jnp.exp(scores - jnp.moveaxis(normaliser, 1, 3))
        slopes = _product("btkgh,bskh->bkgts", cotangent, value) - jnp.moveaxis(mean, 1, 3)
        slopes = scale * weights * slopes
        if softcap is not None:
            slopes = slopes * (1 - (jnp.where(mask, scores, 0) / softcap) ** 2)
        slopes, weights = slopes.astype(narrow), weights.astype(narrow)
        in_query = _product("bkgts,bskh->btkgh", slopes, key).astype(narrow)
        # In this order of the operands the large one needs no transposed copy.
        in_key = _product("btkgh,bkgts->bskh", query, slopes)
        in_value = _product("btkgh,bkgts->bskh", cotangent, weights)
        return jax.tree.map(jnp.add, sums, (in_key, in_value)), in_query

    count = _block_count(query, key)
    operands = [_blocks(x, count, 1) for x in (query, cotangent, mean, normaliser)]
    zeros = jnp.zeros_like(key, wide), jnp.zeros_like(value, wide)
    sums, in_query = jax.lax.scan(
        block, vary_alike(zeros, query)[0], (*operands, _blocks(mask, count, 0))
    )
    return _unblocked(in_query), *(x.astype(narrow) for x in sums), None


_attention.defvjp(_attention_forward, _attention_backward)


def _scores(scale, softcap, query, key, mask) -> Float[Array, "batch key_heads groups query key"]:
    wide = at_least_float32(query.dtype)
    scores = _product("btkgh,bskh->bkgts", query, key) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    # Finite, not -inf: a softmax is then finite even where a row is all masked.
    return jnp.where(mask, scores, jnp.finfo(wide).min)


def _product(form: str, one: Array, other: Array) -> Array:
    """An einsum accumulated and given in float32 or wider."""
    return jnp.einsum(form, one, other, preferred_element_type=at_least_float32(one.dtype))


def _block_count(query: Array, key: Array) -> int:
    """Into how many blocks queries are split, so that not all scores are held at once."""
    heads = query.shape[0] * query.shape[2] * query.shape[3]
    at_once = SCORES_AT_ONCE.get(jax.default_backend(), SCORES_AT_ONCE_ELSEWHERE)
    return nearest_divisor(query.shape[1], heads * query.shape[1] * key.shape[1] / at_once)


def _blocks(x: Array, count: int, axis: int) -> Array:
    """Neighbours along `axis` together, the blocks as a new first axis."""
    blocked = x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
    return jnp.moveaxis(blocked, axis, 0)


def _unblocked(blocks: Array) -> Array:
    """The inverse of `_blocks` along the axis of queries."""
    blocks = jnp.moveaxis(blocks, 0, 1)
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def _behind(prompt: Array, own: Array) -> Array:
    """Each completion's rows behind those of the prompt."""
    before = jnp.broadcast_to(prompt, (own.shape[0], *prompt.shape[1:]))
    return jnp.concatenate([before, own], axis=1)


def _runs(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """The start, the count and the width of each run of completions of equal width."""
    start = layout.prompt_width
    for width, run in itertools.groupby(layout.completion_widths):
        count = len(list(run))
        yield start, count, width
        start += count * width


def _split(key: PRNGKeyArray | None, count: int) -> list[PRNGKeyArray | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))
