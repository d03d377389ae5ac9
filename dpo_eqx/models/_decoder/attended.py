"""Attention and its derivatives as one function, by the kernels of the platform or in blocks.

`blockwise.py` has the blocks, and `kernels.py` the kernels. `attention.py` makes the mask.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from ..._jax.by_platform import by_platform
from ..._jax.dtypes import at_least_float32
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
    return by_platform(
        lambda platform: blockwise.block_size(platform, *primals[:2]),
        lambda size, *arrays: blockwise.push(how.scale, how.softcap, size, *arrays),
        (*primals[:3], _mask_of(primals)),
        results,
        tangents,
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

    def run(self, where: Where, *operands: Array) -> Sequence[Array]:
        how, query = self.how, operands[0]
        kernel = kernels.find(where, how, query) if how.use_kernels else None
        if kernel is not None:
            return kernel.forward(*operands), no_normaliser(query)
        parts = _parts(how, where, operands)
        results = [blockwise.forward(how.scale, how.softcap, size, *of) for _, size, of in parts]
        return [jnp.concatenate(x, axis=1) for x in zip(*results, strict=True)]


@dataclasses.dataclass(frozen=True)
class Pull:
    """The cotangents of query, key and value, from those of the results, and from both."""

    how: How

    def shapes(self, *operands: jax.ShapeDtypeStruct) -> Sequence[jax.ShapeDtypeStruct]:
        return operands[4:7]

    def run(self, where: Where, *operands: Array) -> Sequence[Array]:
        how, cotangents, results, primals = self.how, operands[:2], operands[2:4], operands[4:]
        query, key, value = primals[:3]
        # It finds one if the forward pass found one: the `vmap`s around that are around this, too.
        kernel = kernels.find(where, how, query) if how.use_kernels else None
        if kernel is not None:
            return kernel.pull(cotangents[0], *primals)
        pulled = [
            blockwise.pull(
                how.scale,
                how.softcap,
                size,
                of,
                [x[:, own] for x in results],
                [x[:, own] for x in cotangents],
            )
            for own, size, of in _parts(how, where, primals)
        ]
        in_query, in_key, in_value = zip(*pulled, strict=True)
        return (
            jnp.concatenate(in_query, axis=1),
            _sum_from_the_front(in_key, like=key),
            _sum_from_the_front(in_value, like=value),
        )


def _parts(
    how: How, where: Where, operands: Sequence[Array]
) -> Iterator[tuple[slice, int, tuple[Array, ...]]]:
    """The parts of the queries: where they are, the size of their blocks, and their operands."""
    (query, key, value), seen = operands[:3], _mask_of(operands)
    for own, keys in visible_parts(how.form, query.shape[1], key.shape[1]):
        of = query[:, own], key[:, keys], value[:, keys], seen[own, keys]
        yield own, blockwise.block_size(where.platform, *of[:2]), of


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
    parts: Sequence[Float[Array, "batch _ key_heads head_width"]],
    *,
    like: Float[Array, "batch key key_heads head_width"],
) -> Float[Array, "batch key key_heads head_width"]:
    """The sum of arrays for the first keys, in the shape and dtype of `like`."""
    keys, no = like.shape[1], (0, 0)
    whole = [jnp.pad(x, (no, (0, keys - x.shape[1]), no, no)) for x in parts]
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
