"""Decoding: reads each prompt once, then draws several completions of it, token by token.

A `Transformer` keeps the keys and values of the prompt, which all samples share, apart from those
of each sample. The states of its recurrent layers begin as the prompt's in each sample, and so does
the state of a `RecurrentPolicy`. Any other policy runs on the whole row for each token. So does a
`Transformer` in rows so long that its rotary embeddings depend on their length. `generate.py` has
the public functions.
"""

from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..._arrays.layout import Layout
from ..._arrays.samples import Samples
from ..._arrays.tokens import Tokens
from ..._jax.dtypes import at_least_float32
from ..._jax.mapped_axes import vary_alike
from ..._scoring.policy_checks import call_extend, call_start, check_keeps_shapes, checked_logits
from ..._scoring.predict import offers_recurrence, unembedding_of
from ...protocols import RecurrentPolicy
from .attention import attend_parts, visible
from .blocks import Caches
from .incremental import read_prompt
from .transformer import Transformer

# The width of the first cache of new tokens. Each further one is twice as wide, so that a short
# completion does not pay for the longest that is allowed.
FIRST_WIDTH = 64

# Sequences of ids, each of which ends a completion.
Ends = tuple[tuple[int, ...], ...]
# Draws the next ids, from the logits and the number of the step.
Draw = Callable[
    [Float[Array, "prompts samples vocab"], Int[Array, ""]], Int[Array, "prompts samples"]
]


def decode(
    policy: PyTree,
    prompt: Tokens,
    draw: Draw,
    *,
    samples: int,
    steps: int,
    ends: Ends,
) -> Samples:
    """Draws completions of at most `steps` tokens, and stops once all have ended.

    **Arguments:**

    - `policy`: a `Transformer`, a `RecurrentPolicy`, or any causal callable from ids to logits.
    - `prompt`: the prompts, with ids in int32. Shape `(prompts, length)`.
    - `draw`: returns the next ids, from the logits and the number of the step.
    - `samples`: the number of completions of each prompt.
    - `steps`: the largest number of tokens in a completion.
    - `ends`: sequences of ids, each of which ends a completion.
    """
    reader = _reader_of(policy, prompt.ids.shape[1] + steps)
    lengths = prompt.mask.sum(axis=1)
    lead = reader.lead
    start = jax.vmap(reader.start, out_axes=(lead, lead, 0))
    shared, own, logits = start(jnp.asarray(prompt.ids), lengths)
    # Over prompts, and within each over its samples, which all read one `shared`.
    advance = jax.vmap(reader.advance, (None, lead, 0, None, None), (lead, 0))
    advance = jax.vmap(advance, (lead, lead, 0, 0, None), (lead, 0))
    fill = ends[0][-1] if ends else 0

    def append(step, logits, written):
        ids, mask, log_probs, done = written
        token = jnp.where(done, fill, draw(logits, step)).astype(jnp.int32)
        log_probs = log_probs + jnp.where(done, 0, _log_prob(logits, token))
        ids, mask = ids.at[..., step].set(token), mask.at[..., step].set(~done)
        return ids, mask, log_probs, done | _has_ended(ids, step, ends)

    # All rows step together: a row that has ended writes masked-out tokens until the last one ends.
    def one_step(carry):
        step, own, written = carry
        new, logits = advance(shared, own, written[0][..., step - 1], lengths, step - 1)
        own = _written(own, new, step - 1, reader.axis)
        return step + 1, own, append(step, logits, written)

    rows = (len(lengths), samples)
    own = jax.tree.map(lambda x: _repeated(x, lead + 1, samples), own)
    logits = _repeated(logits, 1, samples)
    written = (
        jnp.full((*rows, steps), fill, jnp.int32),
        jnp.zeros((*rows, steps), bool),
        jnp.zeros(rows, at_least_float32(logits.dtype)),
        jnp.zeros(rows, bool),
    )
    # The first token needs no step of the policy beyond the prompt.
    first = jnp.zeros_like(lengths[0])
    carry = (first + 1, own, append(first, logits, vary_alike(written, logits)[0]))
    for width in widths(steps):
        step, own, written = carry
        own = own if reader.axis is None else _grown(own, reader.axis, width)
        carry = jax.lax.while_loop(_until(width), one_step, (step, own, written))
    ids, mask, log_probs, _ = carry[-1]
    return Samples(Tokens(ids, mask), log_probs)


def _reader_of(policy: PyTree, longest: int) -> "Cached | Recurrent | Uncached":
    """The reader of a policy, in rows of at most `longest` tokens."""
    if isinstance(policy, Transformer):
        return Cached(policy) if policy.shares_prompts(longest) else Uncached(policy)
    return Recurrent(policy) if offers_recurrence(policy) else Uncached(policy)


def widths(steps: int) -> Iterator[int]:
    """The widths of the caches for `steps` new tokens, in order: doubled until they suffice."""
    width = FIRST_WIDTH
    while width < steps:
        yield width
        width *= 2
    yield steps


def _until(width: int) -> Callable[[tuple[Any, ...]], Bool[Array, ""]]:
    """Whether a step is left before `width`, and a row that has not ended."""

    def is_going(carry):
        step, _, (*_, done) = carry
        return (step < width) & ~done.all()

    return is_going


def _repeated(x: Array, axis: int, count: int) -> Array:
    """`x` with a new axis, along which it is repeated."""
    return jnp.broadcast_to(jnp.expand_dims(x, axis), (*x.shape[:axis], count, *x.shape[axis:]))


def _grown(own: PyTree, axis: int, width: int) -> PyTree:
    """The states of the samples with room for `width` new tokens."""
    if isinstance(own, Caches):
        # The state of a recurrent layer has no axis of tokens.
        return own._replace(attention=_grown(own.attention, axis, width))

    def grown(x):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, width - x.shape[axis])
        return jnp.pad(x, padding)

    return jax.tree.map(grown, own)


def _written(own: PyTree, new: PyTree, step: Int[Array, ""], axis: int | None) -> PyTree:
    """The states of the samples after the new token number `step`, from `new` of `advance`."""
    if axis is None or not isinstance(own, Caches):
        return new
    # Not in `advance`: a `vmap` of the update would copy the whole cache.
    attention = jax.tree.map(
        lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, step, axis=axis),
        own.attention,
        new.attention,
    )
    return new._replace(attention=attention)


def _log_prob(
    logits: Float[Array, "prompts samples vocab"], token: Int[Array, "prompts samples"]
) -> Float[Array, "prompts samples"]:
    """The log-probability of each token at temperature 1, in float32 or wider."""
    wide = logits.astype(at_least_float32(logits.dtype))
    picked = jnp.take_along_axis(wide, token[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(wide, axis=-1)


def _has_ended(
    ids: Int[Array, "prompts samples steps"],
    step: Int[Array, ""],
    ends: Ends,
) -> Bool[Array, "prompts samples"]:
    """Whether the tokens up to `step` end with one of the sequences in `ends`."""
    ended = jnp.zeros(ids.shape[:2], bool)
    for end in ends:
        if len(end) <= ids.shape[-1]:
            first = step - len(end) + 1
            last = jax.lax.dynamic_slice_in_dim(ids, jnp.maximum(first, 0), len(end), axis=-1)
            same = last == jnp.broadcast_to(jnp.asarray(end, jnp.int32), last.shape)
            ended = ended | ((first >= 0) & same.all(axis=-1))
    return ended


class Cached(eqx.Module):
    """Reads one row with a cache: keys and values of the prompt and of the new tokens, and states.

    All samples share the keys and values of the prompt; each has its own of the new tokens, and its
    own states of recurrent layers.
    """

    policy: Transformer
    # Rows come after the axis of layers, and tokens after that of heads: the scan over the layers
    # and the products of each head then read the cache as it lies.
    lead: int = eqx.field(static=True, default=1)
    # The axis of the new tokens in the states of all samples.
    axis: int = eqx.field(static=True, default=4)

    def start(self, ids: Int[Array, " prompt"], length: Int[Array, ""]):
        """Reads a prompt: its cache, an empty one for new tokens, and the logits of the first."""
        hidden, caches = read_prompt(self.policy, ids, length)
        by_head = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), caches.attention)
        caches = caches._replace(attention=by_head)
        own = caches._replace(attention=jax.tree.map(lambda x: x[:, :, :0], by_head))
        shared = caches._replace(recurrence=None)
        return shared, own, self.policy.unembed(hidden[length - 1][None])[0]

    def advance(self, shared, own, token: Int[Array, ""], length: Int[Array, ""], step):
        """Reads the new token number `step`: what to write, and the logits of the next token."""
        config = self.policy.config
        prompt, new = (_places(x).astype(length.dtype) for x in (shared, own))
        # The position counts real tokens, and not the padding of the prompt.
        position = (length + step)[None]

        def masks_of(window):
            on_prompt = visible(position, prompt, window) & (prompt < length)[None]
            return on_prompt, visible(position, length + new, window) & (new < step)[None]

        def attend_cached(query, key, value, sinks, masks, caches, rng):
            (shared, own), (on_prompt, on_own) = caches, masks
            # The token itself is not in the cache yet: a layer returns what is to be written, and
            # one write for all layers follows.
            key, value = jnp.swapaxes(key, 0, 1), jnp.swapaxes(value, 0, 1)
            parts = (*shared, on_prompt), (*own, on_own), (key, value, jnp.ones((1, 1), bool))
            return attend_parts(query, parts, sinks=sinks, config=config), (key, value)

        caches = Caches((shared.attention, own.attention), own.recurrence)
        hidden, written = self.policy.run(
            token[None], position, attend_cached, masks_of, caches=caches
        )
        return written, self.policy.unembed(hidden)[0]


def _places(caches: Caches) -> Int[Array, " length"]:
    """The places of the tokens in a cache of keys and values; none if no layer has attention."""
    leaves = jax.tree.leaves(caches.attention)
    return jnp.arange(leaves[0].shape[2] if leaves else 0)


class Recurrent(eqx.Module):
    """Reads one row by a state of fixed shapes; samples share nothing but their first state."""

    policy: RecurrentPolicy
    lead: int = eqx.field(static=True, default=0)
    axis: None = eqx.field(static=True, default=None)

    def start(self, ids: Int[Array, " prompt"], length: Int[Array, ""]):
        """Reads a prompt: nothing to share, its state, and the logits of the first new token."""
        state, hidden = call_start(self.policy, ids, length, None)
        return None, jax.tree.map(jnp.asarray, state), self._logits(hidden[None])

    def advance(self, shared, own, token: Int[Array, ""], length: Int[Array, ""], step):
        """Reads the new token number `step`: the state, and the logits of the next token."""
        state, hidden = call_extend(self.policy, own, token[None], None)
        state = jax.tree.map(jnp.asarray, state)
        check_keeps_shapes(self.policy, own, state)
        return state, self._logits(hidden)

    def _logits(self, hidden: Float[Array, "1 width"]) -> Float[Array, " vocab"]:
        return unembedding_of(self.policy).logits(hidden)[0]


class Uncached(eqx.Module):
    """Runs any policy on the whole row for each token; its state is the row."""

    policy: PyTree
    lead: int = eqx.field(static=True, default=0)
    axis: int = eqx.field(static=True, default=2)

    def start(self, ids: Int[Array, " prompt"], length: Int[Array, ""]):
        """The prompt, no new tokens, and the logits of the first of them."""
        return ids, ids[:0], self._logits(ids, length)[length - 1]

    def advance(self, shared, own, token: Int[Array, ""], length: Int[Array, ""], step):
        """Writes the new token number `step`: the new tokens, and the logits of the next one."""
        own = own.at[step].set(token)
        row = jnp.concatenate([shared, jnp.zeros_like(own)])
        # Behind the real tokens of the prompt, over its padding.
        row = jax.lax.dynamic_update_slice_in_dim(row, own, length, axis=0)
        return own, self._logits(row, length + step + 1)[length + step]

    def _logits(
        self, row: Int[Array, " length"], tokens: Int[Array, ""]
    ) -> Float[Array, "length vocab"]:
        """The logits of a row of which `tokens` are real."""
        if isinstance(self.policy, Transformer):
            hidden = self.policy.hidden(row, Layout(tokens, row.size, ()))
            return self.policy.unembed(hidden)
        return checked_logits(self.policy, self.policy(row), row)
