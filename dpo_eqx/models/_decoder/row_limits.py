"""How long a row of a `Transformer` may be, and when its length has an effect.

`transformer.py` imports this file, so that a policy is `Any` here.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..._arrays.layout import Layout
from ..._arrays.packed import PackedLayout


def real_tokens(policy: Any, layout: Layout | PackedLayout) -> Int[Array, ""] | None:
    """The real tokens of the sequence in a row; `None` if their number has no effect."""
    if policy.shares_prompts(layout.longest):
        return None
    if isinstance(layout, PackedLayout) or len(layout.completion_widths) > 1:
        raise ValueError(
            "The rotary embeddings of this policy depend on the number of tokens of a prompt "
            f"with its completion if they are more than {policy.config.length_limit}; got a row "
            f"of up to {layout.longest}, in which several completions share a prompt. Run each "
            "completion with its own prompt, as `score_pairs` does, or shorten them."
        )
    if not layout.completion_widths:
        return layout.prompt_length
    sizes = layout.completion_lengths
    return layout.prompt_length + (layout.completion_widths if sizes is None else sizes)[0]


def is_too_long(policy: Any, layout: Layout | PackedLayout) -> Bool[Array, ""] | None:
    """Whether a row needs more positions than were learned; `None` if no row can.

    The last token of a completion needs no position, since nothing is predicted from it.
    """
    if policy.positions is None or layout.longest <= policy.config.max_length:
        return None
    if isinstance(layout, Layout) and not layout.completion_widths:
        return layout.prompt_length > policy.config.max_length
    if isinstance(layout, PackedLayout) or layout.completion_lengths is None:
        policy.check_length(layout.longest)  # exact in a packed row
        return None
    needed = layout.prompt_length + layout.completion_lengths.max() - 1
    return jnp.maximum(needed, layout.prompt_length) > policy.config.max_length
