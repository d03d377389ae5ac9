"""How one row of tokens is made, and the protocol by which a policy attends to it at once.

A row holds a prompt once and all its completions after it, so that a policy that offers
`FastPolicy` encodes the prompt once for all of them.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from .tokens import as_ids


def _length(length: int | Integer[Array | np.ndarray, ""]) -> Int[Array, ""]:
    # Positions are computed in its dtype, and those of 200 tokens in int8 would overflow.
    return as_ids(jnp.asarray(length))


class Layout(eqx.Module):
    """A row of `prompt_width` prompt tokens and, after them, each completion in its own width.

    The prompt is padded on the right to `prompt_width`, each completion to its width; the
    *positions* of a completion's tokens go on from the prompt's real length all the same, as if
    it stood alone behind it.

    **Arguments:**

    - `prompt_length`: the number of real tokens of the prompt, at least 1. A scalar, traced; held
        in int32.
    - `prompt_width`, `completion_widths`: the static widths, for whoever attends blockwise:
        prompt on prompt, each completion on the prompt and on itself.
    """

    prompt_length: Int[Array, ""] = eqx.field(converter=_length)
    prompt_width: int = eqx.field(static=True)
    completion_widths: tuple[int, ...] = eqx.field(static=True)

    @property
    def length(self) -> int:
        """The width of the whole row."""
        return self.prompt_width + sum(self.completion_widths)

    @property
    def longest(self) -> int:
        """Tokens that the prompt does not exceed together with one of its completions."""
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
        """True at `[j, i]` where token `j` sees token `i`.

        That is where `i <= j`, and `i` is a real token of the prompt or in `j`'s own completion.
        Every token sees itself, so that no row is empty: a softmax over it is always finite.
        """
        index, segment = jnp.arange(self.length), self.segments
        causal = index[None, :] <= index[:, None]
        same = segment[None, :] == segment[:, None]
        return causal & (same | (segment[None, :] == 0))
