"""The product of each row with the matrix of its group, for rows in any order of groups.

JAX has such a product for sorted rows, `jax.lax.ragged_dot`, but no `vmap` of it over rows that
share their matrices. Here a `vmap` merges the rows of all examples into one product. Nothing here
knows what chooses the groups. `grouped_blocks.py` has the products on CPUs, and
`grouped_batches.py` those on NVIDIA GPUs.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int

from .by_platform import CPU, CUDA
from .grouped_batches import dot_in_batches, outer_in_batches
from .grouped_blocks import dot_by_blocks, outer_by_blocks
from .mapped_axes import vary_alike
from .partitioning import over_axes

# Rows of the first operand in runs, one run for each matrix of the second operand.
_ROWS_BY_MATRIX = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
# Rows of both operands in the same runs, each of which is summed.
_ROWS_BY_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def grouped_dot(
    x: Float[Array, "rows in"],
    matrices: Float[Array, "groups out in"],
    group: Int[Array, " rows"],
) -> Float[Array, "rows out"]:
    """`matrices[group[i]] @ x[i]` for each row `i`, with work in proportion to the rows.

    It is differentiable to any order and in both modes. A row's result does not depend on the
    other rows.

    **Arguments:**

    - `x`: the rows, in the dtype of `matrices`.
    - `matrices`: one matrix for each group.
    - `group`: the group of each row, from 0 on. A row whose group is not below `groups` meets no
        matrix, and its result is 0.
    """
    return _dot.bind(*vary_alike(x, matrices, group))


def grouped_outer(
    y: Float[Array, "rows out"],
    x: Float[Array, "rows in"],
    group: Int[Array, " rows"],
    groups: int,
) -> Float[Array, "groups out in"]:
    """For each group, the sum of `outer(y[i], x[i])` over its rows `i`.

    It is the derivative of `grouped_dot` with respect to the matrices, and is differentiable as
    `grouped_dot` is. The arguments are as there.
    """
    return _outer.bind(*vary_alike(y, x, group), groups=groups)


def _sorted(group: Int[Array, " rows"], groups: int) -> tuple[Array, Array]:
    """The order that sorts rows by their group, and the number of rows of each group."""
    is_member = group[:, None] == jnp.arange(groups, dtype=group.dtype)[None, :]
    return jnp.argsort(group, stable=True), is_member.sum(axis=0, dtype=jnp.int32)


def _ragged_dot(x: Array, matrices: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot_general(
        x, matrices, sizes, _ROWS_BY_MATRIX, preferred_element_type=x.dtype
    )


def _ragged_outer(y: Array, x: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot_general(y, x, sizes, _ROWS_BY_ROWS, preferred_element_type=x.dtype)


def _dot_of_rows(dot: Callable[..., Array], x: Array, matrices: Array, group: Array) -> Array:
    """The product by a function for sorted rows."""
    order, sizes = _sorted(group, len(matrices))
    y, place = dot(x[order], matrices, sizes), jnp.argsort(order)
    # What is behind the rows of all groups is not defined.
    is_defined = jnp.broadcast_to((group < len(matrices))[:, None], y.shape)
    return jnp.where(is_defined, y[place], jnp.zeros_like(y))


def _outer_of_rows(
    outer: Callable[..., Array], y: Array, x: Array, group: Array, *, groups: int
) -> Array:
    """The sums by a function for sorted rows."""
    order, sizes = _sorted(group, groups)
    return outer(y[order], x[order], sizes)


def _dot_shape(x: Any, matrices: Any, group: Any) -> Any:
    return x.update(shape=(x.shape[0], matrices.shape[1]))


def _outer_shape(y: Any, x: Any, group: Any, *, groups: int) -> Any:
    # The mesh is automatic or manual, so that no axis of a type is sharded.
    whole = NamedSharding(y.sharding.mesh, P(None, None, None))
    return y.update(shape=(groups, y.shape[1], x.shape[1]), sharding=whole)


def _jvp(bind: Callable[..., Array], primals: Any, tangents: Any, **params: Any) -> Any:
    """The rule of a product of two factors and a group. JAX calls it if a factor moves."""
    (one, other, group), (in_one, in_other, _) = primals, tangents
    moved = []
    if not isinstance(in_one, ad.Zero):
        moved.append(bind(in_one, other, group, **params))
    if not isinstance(in_other, ad.Zero):
        moved.append(bind(one, in_other, group, **params))
    return bind(one, other, group, **params), functools.reduce(jnp.add, moved)


def _dot_transpose(cotangent: Any, x: Any, matrices: Any, group: Array) -> list[Any]:
    if isinstance(cotangent, ad.Zero):
        return [None, None, None]
    if ad.is_undefined_primal(x):
        return [grouped_dot(cotangent, jnp.swapaxes(matrices, 1, 2), group), None, None]
    return [None, grouped_outer(cotangent, x, group, matrices.aval.shape[0]), None]


def _outer_transpose(cotangent: Any, y: Any, x: Any, group: Array, *, groups: int) -> list[Any]:
    if isinstance(cotangent, ad.Zero):
        return [None, None, None]
    if ad.is_undefined_primal(y):
        return [grouped_dot(x, cotangent, group), None, None]
    return [None, grouped_dot(y, jnp.swapaxes(cotangent, 1, 2), group), None]


def _leading(count: int, x: Array, dim: int | None) -> Array:
    """`x` with the axis of the examples first."""
    if dim is None:
        return jnp.broadcast_to(x, (count, *x.shape))
    return jnp.moveaxis(x, dim, 0)


def _merged(x: Array) -> Array:
    """An array of examples without the axis of examples."""
    return x.reshape(-1, *x.shape[2:])


def _own_groups(group: Int[Array, "examples rows"], groups: int) -> Int[Array, " all_rows"]:
    """The group of each row if every example has groups of its own."""
    first = groups * jnp.arange(len(group), dtype=group.dtype)
    return (group + first[:, None]).reshape(-1)


def _batch_dot(axis: Any, operands: Any, dims: Any) -> tuple[Array, int | None]:
    """The rows of all examples in one product, on each device for the examples that it has."""
    x, matrices, group = operands
    if dims == (None, None, None):
        return grouped_dot(x, matrices, group), None
    rows = [_leading(axis.size, x, dims[0]), _leading(axis.size, group, dims[2])]
    shared = [matrices]
    if dims[1] is not None:
        rows, shared = [*rows, _leading(axis.size, matrices, dims[1])], []

    def on_part(rows, *shared):
        x, group, *own = rows
        if own:
            group, merged = _own_groups(group, own[0].shape[1]), _merged(own[0])
        else:
            group, merged = _merged(group), shared[0]
        return grouped_dot(_merged(x), merged, group).reshape(*x.shape[:2], -1)

    return over_axes(axis.spmd_name, on_part, rows, *shared), 0


def _batch_outer(axis: Any, operands: Any, dims: Any, *, groups: int) -> tuple[Array, int | None]:
    """All examples in one product, each with groups of its own."""
    if dims == (None, None, None):
        y, x, group = operands
        return grouped_outer(y, x, group, groups), None
    rows = [_leading(axis.size, x, dim) for x, dim in zip(operands, dims, strict=True)]

    def on_part(rows):
        y, x, group = rows
        sums = grouped_outer(
            _merged(y), _merged(x), _own_groups(group, groups), groups * len(group)
        )
        return sums.reshape(len(group), groups, *sums.shape[1:])

    return over_axes(axis.spmd_name, on_part, rows), 0


def _define(
    name: str,
    ragged: Callable[..., Array],
    special: Mapping[str, Callable[..., Array]],
    shape: Callable[..., Any],
    transpose: Callable[..., Any],
    batch: Callable[..., Any],
) -> Primitive:
    """A primitive; `ragged` computes it but on the platforms with a `special` function."""
    primitive = Primitive(name)
    primitive.def_impl(ragged)
    primitive.def_abstract_eval(shape)
    ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive.bind)
    ad.primitive_transposes[primitive] = transpose
    batching.fancy_primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(ragged, multiple_results=False))
    for platform, function in special.items():
        lower = mlir.lower_fun(function, multiple_results=False)
        mlir.register_lowering(primitive, lower, platform=platform)
    return primitive


# A primitive, since JAX's `custom_vmap` has no reverse mode, and inside of a `custom_vjp` it would
# compute the gradient of shared matrices for each example apart.
_dot = _define(
    "grouped_dot",
    functools.partial(_dot_of_rows, _ragged_dot),
    {
        CPU: functools.partial(_dot_of_rows, dot_by_blocks),
        CUDA: functools.partial(_dot_of_rows, dot_in_batches),
    },
    _dot_shape,
    _dot_transpose,
    _batch_dot,
)
_outer = _define(
    "grouped_outer",
    functools.partial(_outer_of_rows, _ragged_outer),
    {
        CPU: functools.partial(_outer_of_rows, outer_by_blocks),
        CUDA: functools.partial(_outer_of_rows, outer_in_batches),
    },
    _outer_shape,
    _outer_transpose,
    _batch_outer,
)
