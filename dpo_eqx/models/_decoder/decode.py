"""Decoding: reads each prompt once, then draws several completions of it, token by token.

`readers.py` runs the policy, one row at a time. `generate.py` has the public functions.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..._arrays.samples import Samples
from ..._arrays.tokens import Tokens
from ..._jax.by_platform import by_platform
from ..._jax.dtypes import at_least_float32
from ..._jax.mapped_axes import vary_alike
from . import apart
from .readers import Cached, Reader, reader_of

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
    reader = reader_of(policy, prompt.ids.shape[1] + steps)
    lengths, lead = prompt.mask.sum(axis=1), reader.lead
    start = jax.vmap(reader.start, out_axes=(lead, lead, 0))
    shared, own, logits = start(jnp.asarray(prompt.ids), lengths)
    own = jax.tree.map(lambda x: _repeated(x, lead + 1, samples), own)
    logits = _repeated(logits, 1, samples)
    append = partial(_append, draw, ends)
    # The first token needs no step of the policy beyond the prompt.
    written = append(jnp.zeros_like(lengths[0]), logits, _nothing(logits, steps, ends))

    def is_worth_it(platform):
        rows = written.done.size
        return isinstance(reader, Cached) and apart.is_worth_it(reader.policy, rows, platform)

    def finish(takes_apart, shared, own, written):
        read = reader, shared, own
        if takes_apart and isinstance(reader, Cached):
            read = reader.taken_apart(shared, own)
        return _finish(*read, lengths, append, written)

    written = by_platform(is_worth_it, finish, shared, own, written)
    return Samples(Tokens(written.ids, written.mask), written.log_probs)


class Written(NamedTuple):
    """What is written so far: see `Samples`; `done` says which completions have ended."""

    ids: Int[Array, "prompts samples steps"]
    mask: Bool[Array, "prompts samples steps"]
    log_probs: Float[Array, "prompts samples"]
    done: Bool[Array, "prompts samples"]


def _nothing(logits: Float[Array, "prompts samples vocab"], steps: int, ends: Ends) -> Written:
    """The state before the first token: ids are those of padding."""
    rows = logits.shape[:2]
    empty = Written(
        jnp.full((*rows, steps), _padding(ends), jnp.int32),
        jnp.zeros((*rows, steps), bool),
        jnp.zeros(rows, at_least_float32(logits.dtype)),
        jnp.zeros(rows, bool),
    )
    return vary_alike(empty, logits)[0]


def _padding(ends: Ends) -> int:
    """The id behind a completion."""
    return ends[0][-1] if ends else 0


def _append(
    draw: Draw,
    ends: Ends,
    step: Int[Array, ""],
    logits: Float[Array, "prompts samples vocab"],
    written: Written,
) -> Written:
    """Draws the token number `step` of each completion that has not ended."""
    done = written.done
    token = jnp.where(done, _padding(ends), draw(logits, step)).astype(jnp.int32)
    ids = written.ids.at[..., step].set(token)
    return Written(
        ids,
        written.mask.at[..., step].set(~done),
        written.log_probs + jnp.where(done, 0, _log_prob(logits, token)),
        done | _has_ended(ids, step, ends),
    )


def _finish(
    reader: Reader,
    shared: PyTree,
    own: PyTree,
    lengths: Int[Array, " prompts"],
    append: Callable[..., Written],
    written: Written,
) -> Written:
    """Draws the tokens after the first one, from the states of all rows."""
    lead = reader.lead
    # Over prompts, and within each over its samples, which all read one `shared`.
    advance = jax.vmap(reader.advance, (None, lead, 0, None, None), (lead, 0))
    advance = jax.vmap(advance, (lead, lead, 0, 0, None), (lead, 0))

    # All rows step together: a row that has ended writes masked-out tokens until the last one ends.
    def one_step(carry):
        step, own, written = carry
        new, logits = advance(shared, own, written.ids[..., step - 1], lengths, step - 1)
        written = append(step, logits, written)
        # The place depends on the ids that were just drawn, which are not negative. So XLA knows
        # that the states were read before, and writes into them without a copy.
        zero = jnp.minimum(written.ids[..., step].min(), 0).astype(step.dtype)
        return step + 1, reader.write(own, new, step - 1 + zero), written

    carry = (jnp.ones_like(lengths[0]), own, written)
    for width in widths(written.ids.shape[-1]):
        step, own, written = carry
        own = reader.grow(own, width)
        carry = jax.lax.while_loop(_until(width), one_step, (step, own, written))
    return carry[-1]


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
        step, _, written = carry
        return (step < width) & ~written.done.all()

    return is_going


def _repeated(x: Array, axis: int, count: int) -> Array:
    """`x` with a new axis, along which it is repeated."""
    return jnp.broadcast_to(jnp.expand_dims(x, axis), (*x.shape[:axis], count, *x.shape[axis:]))


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
