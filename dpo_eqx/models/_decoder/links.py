"""Which token of a row follows which, for layers that carry a state along a sequence.

A layout's completions both follow the prompt, so a row is a tree and not one line. Attention needs
nothing from here.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..._arrays.layout import Layout
from ..._arrays.packed import PackedLayout


class Links(eqx.Module):
    """The sequences in a row of tokens.

    **Arguments:**

    - `parents`: the place of the token that each token follows; -1 if a sequence begins with it.
        Shape `(length,)`.
    - `pairs`: the index of each token's pair. Shape `(length,)`.
    - `segments`: 0 in a prompt, `k + 1` in its completion `k`, -1 in padding. Shape `(length,)`.
    - `has_forks`: whether several completions may follow one prompt.
    """

    parents: Int[Array, " length"]
    pairs: Int[Array, " length"]
    segments: Int[Array, " length"]
    has_forks: bool = eqx.field(static=True)

    @property
    def is_real(self) -> Bool[Array, " length"]:
        """False in padding, which changes no state."""
        return self.segments >= 0


def links_of(layout: Layout | PackedLayout) -> Links:
    """The sequences in a row with this layout."""
    segments, positions = layout.segments, layout.positions
    before = jnp.arange(segments.size, dtype=jnp.int32) - 1
    in_prompt = jnp.where(positions == 0, -1, before)
    parents = jnp.where(segments > 0, layout.predicts.astype(jnp.int32), in_prompt)
    if isinstance(layout, PackedLayout):
        return Links(parents, layout.pairs, segments, True)
    return Links(parents, jnp.zeros_like(segments), segments, len(layout.completion_widths) > 0)


def one_sequence(length: int) -> Links:
    """The links of a row in which each token follows the one before it."""
    zeros = jnp.zeros(length, jnp.int32)
    return Links(jnp.arange(length, dtype=jnp.int32) - 1, zeros, zeros, False)
