"""Attention and its derivatives as one function, by the kernels of the platform or in blocks.

`blockwise.py` has the blocks, and `kernels.py` the kernels. `attention.py` makes the mask.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ..._jax.by_platform import CPU, by_platform
from ..._jax.dtypes import at_least_float32
from ..._jax.in_turns import in_turns
from ..._jax.linear_map import per_tile, with_transpose
from ..._jax.mapped_axes import vary_alike
from ..._jax.platform_rules import Where, by_rule
from . import blockwise, kernels
from .how import Form, How

# The name of the residuals of attention's backward pass, for a policy of `jax.checkpoint`.
ATTENDED = "attended"
# Queries of a row are cut into at most so many parts, and into parts of at least so many queries.
MOST_PARTS, LEAST_QUERIES = 4, 256


def attended(
    how: How,
    query: Float[Array, "batch query key_heads groups head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    mask: Bool[Array, "query key"] | None,
) -> Float[Array, "batch query key_heads groups head_width"]:
    """Attention with grouped heads: the heads of a group share a key and a value.

    The backward pass computes the weights again. Storing them would cost more memory and more time.

    **Arguments:**

    - `how`: the scale, the soft cap and the form of the mask.
    - `query`, `key`, `value`: shapes `(batch, query, key_heads, groups, head_width)` and, for the
        last two, `(batch, key, key_heads, head_width)`.
    - `mask`: true where a query sees a key, of shape `(query, key)`; `None` if the form is
        `"causal"`.

    **Returns:**

    The weighted sums of values, in the shape of `query`.
    """
    return _attended(how, *_operands(query, key, value, mask))[0]


def attended_and_normaliser(
    how: How,
    query: Float[Array, "batch query key_heads groups head_width"],
    key: Float[Array, "batch key key_heads head_width"],
    value: Float[Array, "batch key key_heads head_width"],
    mask: Bool[Array, "query key"] | None,
) -> tuple[
    Float[Array, "batch query key_heads groups head_width"],
    Float[Array, "batch query key_heads groups 1"],
]:
    """What `attended` returns, and the logarithm of the sum over the keys, in float32 or wider.

    The arguments are as there. It runs in blocks, since kernels do not return the sum.
    """
    in_blocks = dataclasses.replace(how, use_kernels=False)
    return _attended(in_blocks, *_operands(query, key, value, mask))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attended(how, *operands):
    """The output, and the normaliser of each query's scores; zeros if a kernel ran."""
    return tuple(by_rule(Forward(how), *operands))


@_attended.defjvp
def _attended_jvp(how, primals, tangents):
    # Named here: a policy of `jax.checkpoint` does not look into a `custom_jvp`.
    results = checkpoint_name(_attended(how, *primals), ATTENDED)
    tangents = vary_alike(tuple(tangents[:3]), primals)[0]

    def push(tangents):
        if how.use_kernels and kernels.on_some_platform(how, primals[0]):
            return per_tile(partial(_push_from_scratch, how))(primals, tangents)
        return _push(how, primals, results, tangents)

    def pull(cotangents):
        return tuple(by_rule(Pull(how), *cotangents, *results, *primals))

    return results, with_transpose(push, pull, tangents, results)


def _push(how, primals, results, tangents):
    """The tangents of the results, in blocks: kernels have no forward mode."""
    query, key = primals[:2]
    batch, queries, key_heads, groups, _ = query.shape
    heads = batch * key_heads * groups

    def run(size, mask, *arrays):
        def one(*arrays):
            primals, results, tangents = (*arrays[:3], mask), arrays[3:5], arrays[5:]
            return blockwise.push(how.scale, how.softcap, size, primals, results, tangents)

        return _each_head(math.inf, one, *arrays)

    return by_platform(
        lambda platform: blockwise.block_size(platform, heads, queries, key.shape[1]),
        run,
        _mask_of(primals),
        *primals[:3],
        *results,
        *tangents,
    )


def _push_from_scratch(how, primals, tangents):
    """The same without the results, whose normaliser may be that of a kernel.

    Reverse mode would run the forward pass twice if this were not in a `jax.checkpoint`.
    """
    in_blocks = dataclasses.replace(how, use_kernels=False)
    return _push(how, primals, _attended(in_blocks, *primals), tangents)


@dataclasses.dataclass(frozen=True)
class Forward:
    """The output and the normaliser, from query, key, value and the mask if there is one."""

    how: How

    def shapes(self, *operands: jax.ShapeDtypeStruct) -> Sequence[jax.ShapeDtypeStruct]:
        query = operands[0]
        return query, normaliser_of(query)

    def at_once(self, where: Where, *operands: jax.ShapeDtypeStruct) -> float:
        query, key = operands[:2]
        return at_once(where, math.prod(query.shape[:4]) * key.shape[1])

    def differentiable(self, *operands: Array) -> Sequence[Array]:
        return _attended(self.how, *operands)

    def run(self, where: Where, *operands: Array) -> Sequence[Array]:
        how, query = self.how, operands[0]
        kernel = kernels.find(where, how, query) if how.use_kernels else None
        if kernel is not None:
            return kernel.forward(*operands), no_normaliser(query)
        most, size_of = _turns(where, *operands[:2])
        seen = _mask_of(operands)

        def one(query, key, value):
            results = [
                blockwise.forward(how.scale, how.softcap, size_of(part), *part)
                for _, part in _parts(how.form, query, key, value, seen)
            ]
            return tuple(jnp.concatenate(x) for x in zip(*results, strict=True))

        return _each_head(most, one, *operands[:3])


@dataclasses.dataclass(frozen=True)
class Pull:
    """The cotangents of query, key and value, from those of the results, and from both."""

    how: How

    def shapes(self, *operands: jax.ShapeDtypeStruct) -> Sequence[jax.ShapeDtypeStruct]:
        return operands[4:7]

    def at_once(self, where: Where, *operands: jax.ShapeDtypeStruct) -> float:
        return Forward(self.how).at_once(where, *operands[4:])

    def run(self, where: Where, *operands: Array) -> Sequence[Array]:
        how, cotangents, results, primals = self.how, operands[:2], operands[2:4], operands[4:]
        query, key, value = primals[:3]
        # It finds one if the forward pass found one: the `vmap`s around that are around this, too.
        kernel = kernels.find(where, how, query) if how.use_kernels else None
        if kernel is not None:
            return kernel.pull(cotangents[0], *primals)
        most, size_of = _turns(where, query, key)
        seen = _mask_of(primals)

        def one(query, key, value, *others):
            pulled = []
            for own, part in _parts(how.form, query, key, value, seen):
                size, of = size_of(part), [x[own] for x in others]
                pulled.append(blockwise.pull(how.scale, how.softcap, size, part, of[:2], of[2:]))
            in_query, in_key, in_value = zip(*pulled, strict=True)
            return (
                jnp.concatenate(in_query),
                _sum_from_the_front(in_key, like=key),
                _sum_from_the_front(in_value, like=value),
            )

        return _each_head(most, one, query, key, value, *results, *cotangents)


def at_once(where: Where, scores: int) -> float:
    """About how many products with so many scores run at once; infinite for all of them.

    On CPUs, XLA runs a product with batch axes in one thread. So only a few run at once, whose
    scores fit the cache. On several devices, a loop over rows or heads would gather them.
    """
    if where.platform != CPU or where.devices > 1 or where.axes:
        return math.inf
    return blockwise.scores_at_once(CPU) / scores


def _turns(
    where: Where, query: Array, key: Array
) -> tuple[float, Callable[[Sequence[Array]], int]]:
    """About how many rows and key heads run at once, and the number of queries in a part's blocks.

    The second is a function of the part's operands.
    """
    batch, queries, key_heads, groups, _ = query.shape
    most = at_once(where, groups * queries * key.shape[1])
    # On a CPU, the queries of a key head are only cut if it runs alone.
    heads = batch * key_heads * groups if most == math.inf else groups

    def size_of(part):
        return blockwise.block_size(where.platform, heads, len(part[0]), len(part[1]))

    return most, size_of


def _each_head(most: float, run: Callable[..., Any], *arrays: Array) -> Any:
    """`run` for each row and each key head, about `most` of them at once.

    All arrays and results have the shape `(batch, length, key_heads, ...)`, and those of `run`
    `(length, ...)`.
    """
    of_row = in_turns(run, most, [1] * len(arrays), out_axes=1)
    return in_turns(of_row, most / arrays[0].shape[2], [0] * len(arrays))(*arrays)


def _parts(
    form: Form, query: Array, key: Array, value: Array, mask: Bool[Array, "query key"]
) -> Iterator[tuple[slice, tuple[Array, Array, Array, Array]]]:
    """The parts of the queries of one key head: where they are, and their operands."""
    for own, keys in visible_parts(form, query.shape[0], key.shape[0]):
        yield own, (query[own], key[keys], value[keys], mask[own, keys])


def visible_parts(form: Form, queries: int, keys: int) -> list[tuple[slice, slice]]:
    """Parts of the queries, each with the keys up to the last that any of its queries sees.

    More parts leave out more keys, and take longer to compile.
    """
    if form == "any":
        return [(slice(0, queries), slice(0, keys))]
    count = max(1, min(MOST_PARTS, queries // LEAST_QUERIES))
    ends = [queries * (i + 1) // count for i in range(count)]
    # The first query of "keys" sees as many keys more than one as there are more keys than queries.
    more = keys - queries if form == "keys" else 0
    return [
        (slice(start, end), slice(0, min(end + more, keys)))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def _sum_from_the_front(
    parts: Sequence[Float[Array, "_ head_width"]], *, like: Float[Array, "key head_width"]
) -> Float[Array, "key head_width"]:
    """The sum of arrays for the first keys, in the shape and dtype of `like`."""
    whole = [jnp.pad(x, ((0, len(like) - len(x)), (0, 0))) for x in parts]
    return sum(whole[1:], start=whole[0]).astype(like.dtype)


def _mask_of(operands: Sequence[Array]) -> Bool[Array, "query key"]:
    """The mask as an array, from query, key, value and the mask if there is one."""
    query, key, _, *mask = operands
    return mask[0] if mask else jnp.tri(query.shape[1], key.shape[1], dtype=bool)


def _operands(query: Array, key: Array, value: Array, mask: Array | None) -> tuple[Array, ...]:
    # Before the `custom_jvp`, whose body JAX runs again on arrays that vary already.
    return vary_alike(query, key, value, *(() if mask is None else (mask,)))


def normaliser_of(query: jax.ShapeDtypeStruct | Array) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the normaliser of each query's scores."""
    return jax.ShapeDtypeStruct((*query.shape[:-1], 1), at_least_float32(query.dtype))


def no_normaliser(query: Array) -> Array:
    """Zeros in place of the normaliser, which kernels do not return."""
    shape = normaliser_of(query)
    return jnp.zeros(shape.shape, shape.dtype)
