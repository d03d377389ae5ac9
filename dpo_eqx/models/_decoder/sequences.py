"""Attention over a prompt and its completions as causal sequences, each with a copy of the prompt.

In parts, a completion needs a mask: the padding of the prompt lies between the tokens that it sees.
A kernel with a mask is slower, and computes what the mask hides. If each completion follows the
real tokens of a copy of the prompt, and the padding comes last, then the causal kernel suffices.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..._jax.dtypes import at_least_float32
from .parts import Run, Widths

# Causal attention: maps query, key and value to the weighted sums of values.
Attend = Callable[[Array, Array, Array], Array]


def pay(widths: Widths, mask_cost: float) -> bool:
    """Whether sequences take less time than parts, which a row without completions never does.

    - `mask_cost`: the time of a kernel with a mask, relative to one that sees all keys.
    """
    prompt = widths.prompt
    in_parts = prompt**2 / 2 + mask_cost * sum(w * (prompt + w) for w in widths.completions)
    as_sequences = sum((prompt + w) ** 2 / 2 for w in widths.completions)
    return 0 < as_sequences < in_parts


def forward(
    attend: Attend,
    widths: Widths,
    query: Float[Array, "batch length key_heads groups head_width"],
    key: Float[Array, "batch length key_heads head_width"],
    value: Float[Array, "batch length key_heads head_width"],
    prompt_length: Int[Array, " batch"],
) -> Float[Array, "batch length key_heads groups head_width"]:
    """The weighted sums of values for all tokens of the rows.

    Tokens of the prompt's padding get those of other tokens. Nothing reads them.
    """
    outputs = []
    for run in widths.runs:
        order, of_prompt, of_completions = _places(run, widths.prompt, prompt_length)
        output = attend(*(_sequences(x, order) for x in (query, key, value)))
        output = output.reshape(len(query), -1, *query.shape[2:])
        outputs += [_take(output, of_prompt[:, 0])] if not outputs else []
        outputs.append(_take(output, of_completions))
    return jnp.concatenate(outputs, axis=1)


def pull(
    attend: Attend,
    widths: Widths,
    cotangent: Float[Array, "batch length key_heads groups head_width"],
    query: Float[Array, "batch length key_heads groups head_width"],
    key: Float[Array, "batch length key_heads head_width"],
    value: Float[Array, "batch length key_heads head_width"],
    prompt_length: Int[Array, " batch"],
) -> tuple[Array, ...]:
    """The cotangents of query, key and value. A prompt gets the sum over its copies."""
    in_prompt, in_completions = [], []
    for run in widths.runs:
        order, of_prompt, of_completions = _places(run, widths.prompt, prompt_length)
        cotangents = _take(cotangent, order)  # (batch, count, sequence, *heads)
        is_read = jax.vmap(partial(_is_read, run, widths.prompt))(prompt_length)
        cotangents = jnp.where(is_read[..., None, None, None], cotangents, 0)
        arrays = [_sequences(x, order) for x in (query, key, value)]
        pulled = jax.vjp(attend, *arrays)[1](_flat(cotangents))
        pulled = [x.reshape(len(query), -1, *x.shape[2:]) for x in pulled]
        in_prompt.append([_take(x, of_prompt) for x in pulled])
        in_completions.append([_take(x, of_completions) for x in pulled])
    return tuple(
        jnp.concatenate([_sum_of_copies(copies), *own], axis=1)
        for copies, *own in zip(zip(*in_prompt, strict=True), *in_completions, strict=True)
    )


def _places(
    run: Run, prompt: int, prompt_length: Int[Array, " batch"]
) -> tuple[
    Int[Array, "batch count sequence"], Int[Array, "batch count prompt"], Int[Array, "batch own"]
]:
    """The places in the row of the tokens of a run's sequences, one after the other, and back.

    A sequence is a permutation of the prompt and a completion: first the real tokens of the
    prompt, then the completion, then the prompt's padding.

    **Returns:**

    The place in the row of each token of the sequences; the places in the sequences of the tokens
    of each copy of the prompt, and of the tokens of all completions.
    """

    def of_row(length):
        def arange(size):
            return jnp.arange(size, dtype=length.dtype)

        place, number = arange(prompt + run.width)[None], arange(run.completions)[:, None]
        own = run.start + run.width * number + place - length
        of_prompt = jnp.where(place < length, place, place - run.width)
        order = jnp.where(_is_own(run, place, length), own, of_prompt)
        starts = (prompt + run.width) * number
        behind = arange(prompt)[None]
        copies = starts + jnp.where(behind < length, behind, behind + run.width)
        return order, copies, (starts + length + arange(run.width)[None]).reshape(-1)

    return jax.vmap(of_row)(prompt_length)


def _is_own(run: Run, place: Int[Array, "1 sequence"], length: Int[Array, ""]) -> Array:
    """Which places of a sequence are those of the completion, of shape `(1, sequence)`."""
    return (place >= length) & (place < length + run.width)


def _is_read(run: Run, prompt: int, length: Int[Array, ""]) -> Bool[Array, "count sequence"]:
    """Which outputs of a run's sequences become outputs of the row."""
    place = jnp.arange(prompt + run.width, dtype=length.dtype)[None]
    # The prompt's outputs are those of the row's first sequence.
    is_whole = (jnp.arange(run.completions) == 0)[:, None] & (run.start == prompt)
    return is_whole | _is_own(run, place, length)


def _sum_of_copies(
    copies: Sequence[Float[Array, "batch _ prompt *heads"]],
) -> Float[Array, "batch prompt *heads"]:
    """The sum over the copies of a prompt in all runs."""
    together = jnp.concatenate(copies, axis=1)
    wide = at_least_float32(together.dtype)
    return together.sum(axis=1, dtype=wide).astype(together.dtype)


def _sequences(
    x: Float[Array, "batch length *heads"], order: Int[Array, "batch count sequence"]
) -> Float[Array, "sequences sequence *heads"]:
    return _flat(_take(x, order))


def _flat(x: Float[Array, "batch count *shape"]) -> Float[Array, "sequences *shape"]:
    return x.reshape(-1, *x.shape[2:])


def _take(
    x: Float[Array, "batch length *heads"], places: Int[Array, "batch *places"]
) -> Float[Array, "batch ..."]:
    """What `x` has at these places, of shape `(batch, *places, *heads)`."""
    return jax.vmap(lambda x, places: x.at[places].get(mode="promise_in_bounds"))(x, places)
