"""Which kernel computes attention on a platform, and how it runs on a mesh.

The kernels are in `fused.py` (NVIDIA) and `splash.py` (TPU). Each module has four functions:
`fits(how, query)`, `attention(how, query, key, value, *mask)` for one device, `tracing()`, a
context in which the kernel and its gradient are traced, and `prefers_sequences(widths)`, which says
whether the kernel is faster if each completion has a copy of the prompt.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from ..._jax.by_platform import CUDA, TPU
from ..._jax.dtypes import at_least_float32
from ..._jax.partitioning import TENSOR
from ..._jax.platform_rules import Where
from . import fused, sequences, splash
from .how import How
from .parts import Widths

KERNELS: dict[str, ModuleType] = {CUDA: fused, TPU: splash}
# JAX partitions neither kernel, so that a device by itself is a mesh of one.
_ALONE = AbstractMesh((1,), ("device",), axis_types=(AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel for arrays of certain shapes, on all devices of a mesh.

    - `module`: has the kernel of one device.
    - `how`: what it computes.
    - `mesh`: the mesh; `None` inside a `shard_map`, where the code is that of one device.
    - `axes`: the axes of the mesh that are automatic.
    - `heads`: how arrays are split. A `vmap` around adds its own axis.
    - `repeats`: how often keys are repeated, so that each part of the heads has its own.
    """

    module: ModuleType
    how: How
    mesh: AbstractMesh | None
    axes: frozenset[Any]
    heads: P
    repeats: int

    def forward(
        self,
        query: Float[Array, "batch query key_heads groups head_width"],
        key: Float[Array, "batch key key_heads head_width"],
        value: Float[Array, "batch key key_heads head_width"],
        *mask: Bool[Array, "query key"],
    ) -> Float[Array, "batch query key_heads groups head_width"]:
        """The weighted sums of values. The arguments are as in `attended`."""
        return self._forward_by(self._forward, (query, key, value), _batched(query, *mask))

    def pull(
        self,
        cotangent: Float[Array, "batch query key_heads groups head_width"],
        query: Float[Array, "batch query key_heads groups head_width"],
        key: Float[Array, "batch key key_heads head_width"],
        value: Float[Array, "batch key key_heads head_width"],
        *mask: Bool[Array, "query key"],
    ) -> tuple[Array, Array, Array]:
        """The cotangents of query, key and value.

        The kernel's forward pass runs again, since its backward pass needs its residuals.
        """
        arrays = cotangent, query, key, value
        return self._pull_by(self._backward, arrays, _batched(query, *mask))

    def forward_of_row(
        self,
        widths: Widths,
        query: Float[Array, "length key_heads groups head_width"],
        key: Float[Array, "length key_heads head_width"],
        value: Float[Array, "length key_heads head_width"],
        prompt_length: Int[Array, ""],
    ) -> Float[Array, "length key_heads groups head_width"]:
        """The weighted sums of values of a whole row, by `sequences.forward`."""

        def forward(*operands):
            return (sequences.forward(self._causal, widths, *operands),)

        arrays = query[None], key[None], value[None]
        return self._forward_by(forward, arrays, (prompt_length[None],))[0]

    def pull_of_row(
        self,
        widths: Widths,
        cotangent: Float[Array, "length key_heads groups head_width"],
        query: Float[Array, "length key_heads groups head_width"],
        key: Float[Array, "length key_heads head_width"],
        value: Float[Array, "length key_heads head_width"],
        prompt_length: Int[Array, ""],
    ) -> tuple[Array, Array, Array]:
        """The cotangents of query, key and value of a whole row, by `sequences.pull`."""
        pull = partial(sequences.pull, self._causal, widths)
        arrays = cotangent[None], query[None], key[None], value[None]
        in_query, in_key, in_value = self._pull_by(pull, arrays, (prompt_length[None],))
        return in_query[0], in_key[0], in_value[0]

    def _causal(self, query, key, value):
        return self._forward(query, key, value)[0]

    def _forward(self, query, key, value, *mask):
        flat = query.reshape(*query.shape[:2], -1, query.shape[-1])
        return (self.module.attention(self.how, flat, key, value, *mask).reshape(query.shape),)

    def _backward(self, cotangent, query, key, value, *mask):
        def forward(*operands):
            return self._forward(*operands, *mask)

        return jax.vjp(forward, query, key, value)[1]((cotangent,))

    def _forward_by(self, function, arrays, beside) -> Array:
        """The output of `function` for query, key and value, in the shape of the query."""
        query, key, value = arrays
        apart = self._apart(query), self._repeated(key), self._repeated(value)
        (output,) = self._on_mesh(function, apart, beside, results=1)
        return output.reshape(query.shape)

    def _pull_by(self, function, arrays, beside) -> tuple[Array, Array, Array]:
        """The cotangents by `function` for the output's cotangent, query, key and value."""
        cotangent, query, key, value = arrays
        queries = self._apart(cotangent), self._apart(query)
        apart = *queries, self._repeated(key), self._repeated(value)
        in_query, in_key, in_value = self._on_mesh(function, apart, beside, results=3)
        return in_query.reshape(query.shape), self._summed(in_key), self._summed(in_value)

    def _on_mesh(self, function, arrays, beside, *, results: int):
        """`function` on each device. `arrays` have heads along their third axis, `beside` none."""
        function = _merging(function)
        if self.mesh is not None:
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=(self.heads,) * len(arrays) + (P(),) * len(beside),
                out_specs=(self.heads,) * results,
                axis_names=set(self.axes),
                check_vma=False,
            )
        with self.module.tracing():
            return function(*arrays, *beside)

    def _apart(self, x: Array) -> Array:
        """Queries as those of `repeats` times as many keys."""
        if self.repeats == 1:
            return x
        return x.reshape(*x.shape[:2], x.shape[2] * self.repeats, -1, x.shape[4])

    def _repeated(self, x: Array) -> Array:
        return x if self.repeats == 1 else jnp.repeat(x, self.repeats, axis=2)

    def _summed(self, x: Array) -> Array:
        """The transpose of `_repeated`."""
        if self.repeats == 1:
            return x
        apart = x.reshape(*x.shape[:2], -1, self.repeats, x.shape[3])
        return apart.sum(axis=3, dtype=at_least_float32(x.dtype)).astype(x.dtype)


def on_some_platform(how: How, query: Array) -> bool:
    """Whether there is a platform with a kernel for arrays of these shapes."""
    return any(kernel.fits(how, query) for kernel in KERNELS.values())


def find(where: Where, how: How, query: Array) -> Kernel | None:
    """The kernel for arrays as in `attended`; `None` if there is none.

    On a mesh with automatic axes, `vmap`s around must split over all of them but `tensor`, as the
    scores do. Otherwise each device would compute all rows. A `shard_map` around must be over all
    axes.
    """
    module = KERNELS.get(where.platform)
    if module is None or not module.fits(how, query):
        return None
    make = partial(Kernel, module, how)
    mesh = jax.typeof(query).sharding.mesh
    if mesh.empty:
        alone = make(_ALONE, frozenset(_ALONE.axis_names), P(), 1)
        return alone if where.devices == 1 else None
    axes = frozenset(mesh.auto_axes)
    if not axes and not mesh.explicit_axes:
        return make(None, axes, P(), 1)
    # Inside a `shard_map` over some axes, JAX loses which of them the results vary over.
    is_whole = len(axes) == len(mesh.axis_names)
    if not is_whole or any(mesh.shape[name] > 1 for name in axes - where.axes - {TENSOR}):
        return None
    parts = mesh.shape[TENSOR] if TENSOR in axes - where.axes else 1
    key_heads, groups = query.shape[2:4]
    repeats = math.lcm(key_heads, parts) // key_heads
    heads = P(None, None, TENSOR) if parts > 1 else P()
    return make(mesh, axes, heads, repeats) if groups % repeats == 0 else None


def on_some_platform_for_rows(how: How, widths: Widths, query: Array) -> bool:
    """Whether there is a platform with a kernel that prefers sequences for rows of these shapes."""
    preferring = [x for x in KERNELS.values() if x.prefers_sequences(widths)]
    return how.use_kernels and any(x.fits(how, query[None]) for x in preferring)


def find_for_row(where: Where, how: How, widths: Widths, query: Array) -> Kernel | None:
    """The kernel for a whole row as in `attended_row`; `None` if parts are faster or needed."""
    kernel = find(where, how, query[None])
    return kernel if kernel is not None and kernel.module.prefers_sequences(widths) else None


def _batched(
    query: Float[Array, "batch query key_heads groups head_width"],
    *mask: Bool[Array, "query key"],
) -> tuple[Bool[Array, "batch query key"], ...]:
    return tuple(jnp.broadcast_to(x, (query.shape[0], *x.shape)) for x in mask)


def _merging(function: Callable) -> Callable:
    """`function` of arrays with a batch axis, whose `vmap` rule merges the new axis into it.

    JAX's own rules for the kernels fail on a mask, or run row by row.
    """
    merging = custom_vmap(function)

    @merging.def_vmap
    def of_more(count, is_batched, *operands):
        def merged(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (count, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = merging(*jax.tree.map(merged, operands, tuple(is_batched)))
        split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return merging
