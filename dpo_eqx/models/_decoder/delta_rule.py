r"""The gated delta rule over a row of tokens, in chunks.

A head has a state $S$ of shape `(key_width, value_width)`. A token with query $q$, key $k$, value
$v$, decay $a$ and rate $\beta$ changes it to $S \leftarrow a S + \beta k (v - a S^T k)^T$ and reads
$S^T q$. Projections and norms are in `delta_net.py`.

??? cite

    Yang, Kautz and Hatamizadeh, *Gated Delta Networks: Improving Mamba2 with Delta Rule*, 2024
    (arXiv 2412.06464), section 3.3. Differs: the sequences of a row form a tree (`links.py`).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..._jax.mapped_axes import vary_alike
from .links import Links
from .unit_triangular import solve_unit_lower

# Tokens in a chunk. Larger chunks have fewer steps in sequence, and more work in each.
CHUNK = 64


def gated_delta_rule(
    query: Float[Array, "length heads key_width"],
    key: Float[Array, "length heads key_width"],
    value: Float[Array, "length heads value_width"],
    log_decay: Float[Array, "length heads"],
    rate: Float[Array, "length heads"],
    links: Links,
    state: Float[Array, "heads key_width value_width"] | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "length heads value_width"], Float[Array, "heads key_width value_width"]]:
    r"""What each token reads from the state, and the state after the last real token.

    Inside a chunk, the values that all tokens write solve one triangular system, as each depends on
    those written before it. A `lax.scan` carries the states from chunk to chunk: that of the
    sequence in progress, and that at the end of its prompt, from which other completions fork.

    **Arguments:**

    - `query`, `key`, `value`: shapes `(length, heads, key_width)` twice, and
        `(length, heads, value_width)`, in float32 or wider.
    - `log_decay`: $\log a$, at most 0. Shape `(length, heads)`.
    - `rate`: $\beta$. Shape `(length, heads)`.
    - `links`: which token follows which.
    - `state`: the state before the row; `None` for zeros. Shape `(heads, key_width, value_width)`.
    - `chunk`: the number of tokens in a chunk.
    """
    length, heads, key_width = key.shape
    chunks = chunks_of(links, min(chunk, length))
    size, slots = chunks.origins.shape[1:]
    query, key, value = (_blocked(x, size) for x in (query, key, value))
    log_decay, rate = (_blocked(x, size) for x in (log_decay, rate))  # (chunks, heads, chunk)
    if state is None:
        state = jnp.zeros((heads, key_width, value.shape[-1]), value.dtype)
    parts = _within(chunks, query, key, value, log_decay, rate)

    def step(states, parts):
        # In `states`, the slots follow each other along the axis of keys.
        written = parts.written - parts.erased @ states
        output = parts.reads @ states + parts.scores @ written
        kept = states.reshape(heads, slots, -1)
        kept = (parts.carried @ kept).reshape(states.shape)
        return kept + jnp.swapaxes(parts.keys, 1, 2) @ written, output

    start = vary_alike(jnp.tile(state, (1, slots, 1)), parts.written)[0]
    states, output = jax.lax.scan(step, start, parts)
    output = jnp.swapaxes(output, 1, 2).reshape(-1, heads, value.shape[-1])[:length]
    return output, states[:, :key_width]


class Chunks(eqx.Module):
    """How the tokens of each chunk depend on each other and on the states before the chunk.

    Slot 0 has the state of the sequence in progress. Slot 1, if rows have forks, has the state at
    the last token of its prompt so far.

    **Arguments:**

    - `ancestors`: whether token `i` comes after token `j`, or is `j`. Shape
        `(chunks, chunk, chunk)`.
    - `origins`: the slot whose state precedes a token's sequence in this chunk; none if it begins
        here. Shape `(chunks, chunk, slots)`.
    - `ends`: the token after which a slot's next state is read, in the chunk from 0; -1 if the slot
        keeps its state. Shape `(chunks, slots)`.
    """

    ancestors: Bool[Array, "chunks chunk chunk"]
    origins: Bool[Array, "chunks chunk slots"]
    ends: Int[Array, "chunks slots"]


def chunks_of(links: Links, size: int) -> Chunks:
    """The chunks of a row."""
    padding = (0, -links.segments.size % size)
    pairs, segments = (
        jnp.pad(x.astype(jnp.int32), padding, constant_values=-1)
        for x in (links.pairs, links.segments)
    )
    place = jnp.arange(segments.size, dtype=jnp.int32)
    last = [jax.lax.cummax(jnp.where(segments >= 0, place, -1))]
    if links.has_forks:
        last.append(jax.lax.cummax(jnp.where(segments == 0, place, -1)))
    ends = jnp.stack(last, axis=-1)[size - 1 :: size]  # (chunks, slots), places in the row
    starts = place[::size]
    # The last real token before the chunk; the state of the caller, if there is none.
    entry = jnp.concatenate([jnp.full(1, -1, jnp.int32), ends[:-1, 0]])[:, None]
    entry_pair, entry_segment = pairs[jnp.maximum(entry, 0)], segments[jnp.maximum(entry, 0)]
    pairs, segments = pairs.reshape(-1, size), segments.reshape(-1, size)
    goes_on = (pairs == entry_pair) & (segments == entry_segment)
    origins = [(entry < 0) | goes_on]
    if links.has_forks:
        origins.append((entry >= 0) & (pairs == entry_pair) & (segments != entry_segment))
    is_ancestor = (
        jnp.tri(size, dtype=bool)[None]
        & (pairs[:, :, None] == pairs[:, None, :])
        & ((segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :]))
        & (segments[:, None, :] >= 0)
    )
    local = jnp.where(ends >= starts[:, None], ends - starts[:, None], -1)
    return Chunks(is_ancestor, jnp.stack(origins, axis=-1), local)


class Parts(eqx.Module):
    """What the step of a chunk needs; the axis `memory` is slots times the width of a key."""

    written: Float[Array, "chunks heads chunk value_width"]
    erased: Float[Array, "chunks heads chunk memory"]
    reads: Float[Array, "chunks heads chunk memory"]
    scores: Float[Array, "chunks heads chunk chunk"]
    keys: Float[Array, "chunks heads chunk memory"]
    carried: Float[Array, "chunks heads slots slots"]


def _within(
    chunks: Chunks,
    query: Float[Array, "chunks heads chunk key_width"],
    key: Float[Array, "chunks heads chunk key_width"],
    value: Float[Array, "chunks heads chunk value_width"],
    log_decay: Float[Array, "chunks heads chunk"],
    rate: Float[Array, "chunks heads chunk"],
) -> Parts:
    """Everything that does not depend on the states before the chunks, for all of them at once."""
    ancestors = chunks.ancestors[:, None]  # (chunks, 1, chunk, chunk)
    # The decay of each token's sequence since the start of the chunk.
    total = jnp.where(ancestors, log_decay[:, :, None, :], 0).sum(axis=-1)
    decay = _exp_where(ancestors, total[..., :, None] - total[..., None, :])
    overlap = rate[..., None] * (key @ jnp.swapaxes(key, -1, -2)) * decay
    origins = chunks.origins[:, None].astype(total.dtype)
    since = jnp.exp(total)[..., None] * origins  # (chunks, heads, chunk, slots)
    known = jnp.concatenate(
        [rate[..., None] * value, _by_slot(since, rate[..., None] * key)], axis=-1
    )
    written, erased = jnp.split(solve_unit_lower(overlap, known), [value.shape[-1]], axis=-1)
    kept, carried = _at_ends(chunks, total)
    return Parts(
        written=written,
        erased=erased,
        reads=_by_slot(since, query),
        scores=(query @ jnp.swapaxes(key, -1, -2)) * decay,
        keys=_by_slot(kept, key),
        carried=carried,
    )


def _at_ends(
    chunks: Chunks, total: Float[Array, "chunks heads chunk"]
) -> tuple[Float[Array, "chunks heads chunk slots"], Float[Array, "chunks heads slots slots"]]:
    """How much of each token and of each slot is left in the states after the chunk."""
    size, slots = chunks.origins.shape[1:]
    places = jnp.arange(size, dtype=jnp.int32)
    is_end = chunks.ends[:, :, None] == places[None, None]  # (chunks, slots, chunk)
    is_before = (is_end[..., None] & chunks.ancestors[:, None]).any(axis=2)[:, None]
    at_end = jnp.where(is_end[:, None], total[:, :, None], 0).sum(axis=-1)  # (chunks, heads, slots)
    kept = _exp_where(is_before, at_end[..., None] - total[:, :, None])
    origin = (is_end[..., None] & chunks.origins[:, None]).any(axis=2)  # (chunks, slots, slots)
    stays = (chunks.ends < 0)[:, :, None] & jnp.eye(slots, dtype=bool)[None]
    carried = jnp.where(stays[:, None], 1, jnp.exp(at_end)[..., None])
    is_carried = (origin | stays)[:, None]
    return jnp.swapaxes(kept, -1, -2), jnp.where(is_carried, carried, 0)


def _exp_where(mask: Bool[Array, "*shape"], x: Float[Array, "*other"]) -> Array:
    """The exponential where the mask is true, else 0; elsewhere `x` may overflow."""
    return jnp.where(mask, jnp.exp(jnp.where(mask, x, 0)), 0)


def _by_slot(
    factor: Float[Array, "chunks heads chunk slots"], x: Float[Array, "chunks heads chunk width"]
) -> Float[Array, "chunks heads chunk memory"]:
    """`x` times the factor of each slot, slot after slot."""
    product = factor[..., None] * x[..., None, :]
    return product.reshape(*x.shape[:-1], -1)


def _blocked(x: Array, size: int) -> Array:
    """Chunks of tokens as a first axis and heads as a second, padded with zeros at the end."""
    padding = [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)
    return jnp.swapaxes(jnp.pad(x, padding).reshape(-1, size, *x.shape[1:]), 1, 2)
