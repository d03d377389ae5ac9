"""The layout of one row of tokens: which sequence each token belongs to, and which tokens it sees.

Rows of one prompt with its completions are here; rows of several pairs are in `packed.py`.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from .tokens import as_ids


def _length(length: int | Integer[Array | np.ndarray, ""]) -> Int[Array, ""]:
    # Positions are computed in the dtype of the length: in int8 that of token 200 overflows.
    return as_ids(jnp.asarray(length))


def _lengths(
    lengths: Integer[Array | np.ndarray, " completions"] | None,
) -> Int[Array, " completions"] | None:
    return None if lengths is None else as_ids(jnp.asarray(lengths))


class AbstractLayout(eqx.Module):
    """The interface of every layout, for a policy that attends through `mask()` and `positions`.

    `Layout` and `PackedLayout` also have `length`, the width of the whole row, and `longest`, an
    upper bound on the number of tokens of a prompt plus one of its completions.
    """

    @property
    @abc.abstractmethod
    def positions(self) -> Int[Array, " length"]:
        """Each token's position in its own sequence, from 0, for rotary or learned positions."""

    @property
    @abc.abstractmethod
    def segments(self) -> Int[Array, " length"]:
        """0 in a prompt, `k + 1` in its completion `k`, -1 in padding before or between them."""

    @property
    @abc.abstractmethod
    def predicts(self) -> Int[Array, " length"]:
        """For every token of a completion, the place of the token whose hidden state predicts it.

        This is the token before it. For the first token of a completion, it is the last real token
        of the prompt. The values at prompt tokens have no meaning.
        """

    @abc.abstractmethod
    def mask(self) -> Bool[Array, "length length"]:
        """True at `[j, i]` if token `j` sees token `i`.

        Token `j` sees `i` if `i <= j`, both belong to one pair, and `i` is a real token of the
        prompt or in `j`'s own completion. Every token sees itself, so no row is empty and a softmax
        over it is always finite.
        """


class Layout(AbstractLayout):
    """A row of `prompt_width` prompt tokens, followed by each completion in its own width.

    The prompt is padded on the right to `prompt_width`, and each completion to its own width. The
    *positions* of a completion's tokens nevertheless continue from the prompt's real length, as if
    that completion followed the prompt directly.

    **Arguments:**

    - `prompt_length`: the number of real tokens of the prompt, at least 1. A traced scalar, held
        in int32.
    - `prompt_width`, `completion_widths`: the static widths, for blockwise attention: the prompt
        attends to itself, and each completion to the prompt and to itself.
    - `completion_lengths`: the number of real tokens of each completion, for a policy that has a
        limited number of positions; `None` if it is unknown. Shape `(completions,)`, traced and
        held in int32.
    """

    prompt_length: Int[Array, ""] = eqx.field(converter=_length)
    prompt_width: int = eqx.field(static=True)
    completion_widths: tuple[int, ...] = eqx.field(static=True)
    completion_lengths: Int[Array, " completions"] | None = eqx.field(
        converter=_lengths, default=None
    )

    @property
    def length(self) -> int:
        """The width of the whole row."""
        return self.prompt_width + sum(self.completion_widths)

    @property
    def longest(self) -> int:
        """An upper bound on the number of tokens of the prompt plus one of its completions."""
        return self.prompt_width + max(self.completion_widths, default=0)

    @property
    def positions(self) -> Int[Array, " length"]:
        """Each token's position in its own sequence, from 0, for rotary or learned positions."""
        length = self.prompt_length
        prompt = jnp.arange(self.prompt_width, dtype=length.dtype)
        completions = [length + jnp.arange(w, dtype=length.dtype) for w in self.completion_widths]
        return jnp.concatenate([prompt, *completions])

    @property
    def segments(self) -> Int[Array, " length"]:
        """0 in the prompt, `k + 1` in completion `k`, -1 in the prompt's padding."""
        dtype = self.prompt_length.dtype
        is_real = jnp.arange(self.prompt_width, dtype=dtype) < self.prompt_length
        prompt = jnp.where(is_real, 0, -1).astype(dtype)
        completions = [jnp.full(w, k + 1, dtype) for k, w in enumerate(self.completion_widths)]
        return jnp.concatenate([prompt, *completions])

    def mask(self) -> Bool[Array, "length length"]:
        """True at `[j, i]` if token `j` sees token `i`.

        Token `j` sees `i` if `i <= j`, and `i` is a real token of the prompt or in `j`'s own
        completion. Every token sees itself, so no row is empty and a softmax over it is always
        finite.
        """
        index, segment = jnp.arange(self.length), self.segments
        causal = index[None, :] <= index[:, None]
        same = segment[None, :] == segment[:, None]
        return causal & (same | (segment[None, :] == 0))

    @property
    def predicts(self) -> Int[Array, " length"]:
        """The place of the token that predicts each completion token; see `AbstractLayout`."""
        before = jnp.arange(self.length, dtype=jnp.int32) - 1
        starts, start = [], self.prompt_width
        for width in self.completion_widths:
            starts.append(start)
            start += width
        last_of_prompt = (self.prompt_length - 1).astype(before.dtype)
        return before.at[jnp.array(starts, jnp.int32)].set(last_of_prompt)
