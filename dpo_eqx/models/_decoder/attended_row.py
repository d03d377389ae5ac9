"""Attention over a whole row, a prompt with its completions, as one function.

If a kernel is faster so, each completion becomes a sequence of its own (`sequences.py`).
Elsewhere the prompt and the completions are parts, each as in `attended.py`.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ..._jax.linear_map import per_tile, with_transpose
from ..._jax.mapped_axes import vary_alike
from ..._jax.platform_rules import Where, by_rule
from . import kernels
from .attended import (
    ATTENDED,
    Forward,
    Pull,
    at_once,
    attended_and_normaliser,
    no_normaliser,
    normaliser_of,
)
from .how import How
from .parts import Widths, join, split, split_like


def attended_row(
    how: How,
    widths: Widths,
    query: Float[Array, "length key_heads groups head_width"],
    key: Float[Array, "length key_heads head_width"],
    value: Float[Array, "length key_heads head_width"],
    prompt_length: Int[Array, ""],
    masks: Sequence[Bool[Array, "_ _"]],
) -> Float[Array, "length key_heads groups head_width"]:
    """Attention of a row without a window: the weighted sums of values, in the shape of `query`.

    **Arguments:**

    - `how`: the scale and the soft cap; its form is `"causal"`, that of the prompt.
    - `widths`: those of the layout.
    - `query`, `key`, `value`: of the whole row.
    - `prompt_length`: the number of real tokens of the prompt.
    - `masks`: for each run of completions, the mask on the prompt and on themselves.
    """
    operands = vary_alike(query, key, value, prompt_length, *masks)
    return _attended_row(how, widths, *operands)[0]


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attended_row(how, widths, *operands):
    """The output, and the normaliser of each query's scores; zeros if a kernel ran."""
    return tuple(by_rule(_Forward(how, widths), *operands))


@_attended_row.defjvp
def _attended_row_jvp(how, widths, primals, tangents):
    # Named here: a policy of `jax.checkpoint` does not look into a `custom_jvp`.
    results = checkpoint_name(_attended_row(how, widths, *primals), ATTENDED)
    tangents = vary_alike(tuple(tangents[:3]), primals)[0]

    def push(tangents):
        return per_tile(partial(_push, how, widths))(primals, tangents)

    def pull(cotangents):
        return tuple(by_rule(_Pull(how, widths), *cotangents, *results, *primals))

    return results, with_transpose(push, pull, tangents, results)


def _push(how, widths, primals, tangents):
    """The tangents of the results, in blocks: kernels have no forward mode."""
    in_blocks = dataclasses.replace(how, use_kernels=False)

    def in_parts(*arrays):
        hows, masks = zip(*_forms(in_blocks, primals[4:]), strict=True)
        parts = zip(hows, split(widths, *arrays), masks, strict=True)
        results = [
            attended_and_normaliser(how, *part, *(mask or (None,))) for how, part, mask in parts
        ]
        return tuple(map(join, zip(*results, strict=True)))

    return jax.jvp(in_parts, primals[:3], tangents)[1]


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The output and the normaliser, from query, key, value, prompt length and masks."""

    how: How
    widths: Widths

    def shapes(self, *operands: jax.ShapeDtypeStruct) -> Sequence[jax.ShapeDtypeStruct]:
        query = operands[0]
        return query, normaliser_of(query)

    def at_once(self, where: Where, *operands: jax.ShapeDtypeStruct) -> float:
        query, key = operands[:2]
        return at_once(where, math.prod(query.shape[:3]) * key.shape[0])

    def differentiable(self, *operands: Array) -> Sequence[Array]:
        return _attended_row(self.how, self.widths, *operands)

    def run(self, where: Where, *operands: Array) -> Sequence[Array]:
        query, key, value, prompt_length, *masks = operands
        kernel = kernels.find_for_row(where, self.how, self.widths, query)
        if kernel is not None:
            output = kernel.forward_of_row(self.widths, query, key, value, prompt_length)
            return output, no_normaliser(query)
        parts = zip(split(self.widths, query, key, value), _forms(self.how, masks), strict=True)
        results = [Forward(how).run(where, *part, *mask) for part, (how, mask) in parts]
        return tuple(map(join, zip(*results, strict=True)))


@dataclasses.dataclass(frozen=True)
class _Pull:
    """The cotangents of query, key and value, from those of the results, and from both."""

    how: How
    widths: Widths

    def shapes(self, *operands: jax.ShapeDtypeStruct) -> Sequence[jax.ShapeDtypeStruct]:
        return operands[4:7]

    def at_once(self, where: Where, *operands: jax.ShapeDtypeStruct) -> float:
        return _Forward(self.how, self.widths).at_once(where, *operands[4:])

    def run(self, where: Where, *operands: Array) -> Sequence[Array]:
        cotangent, query, key, value, prompt_length, *masks = operands[0], *operands[4:]
        kernel = kernels.find_for_row(where, self.how, self.widths, query)
        if kernel is not None:
            arrays = query, key, value
            return kernel.pull_of_row(self.widths, cotangent, *arrays, prompt_length)
        parts, transpose = jax.vjp(partial(split, self.widths), query, key, value)
        # The cotangents of the results, and the results.
        results = zip(*(split_like(self.widths, x) for x in operands[:4]), strict=True)
        pulled = [
            tuple(Pull(how).run(where, *given, *part, *mask))
            for given, part, (how, mask) in zip(
                results, parts, _forms(self.how, masks), strict=True
            )
        ]
        return transpose(pulled)


def _forms(how: How, masks: Sequence[Array]) -> Iterator[tuple[How, tuple[Array, ...]]]:
    """What each part computes, and its mask if it has one."""
    yield how, ()
    for mask in masks:
        yield dataclasses.replace(how, form="keys"), (mask,)
