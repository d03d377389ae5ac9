"""One device's part of a routed sum: the results of its own groups for the tokens sent to them.

It runs inside a `shard_map` over the axis `expert`, which `routed_sum.py` enters. Tokens of all
devices are gathered over the axis, and their sums are scattered.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, PyTree

from .dtypes import at_least_float32
from .mapped_axes import vary_alike, varying_axes
from .partitioning import EXPERT

# Maps rows, the group of each row, and the arrays of all groups to a row for each row.
Function = Callable[[Array, Array, PyTree], Array]
# Tokens `(length, width)`, and the groups and the weights of each, `(length, chosen)`.
Rows = tuple[Array, Array, Array]


def sum_over_devices(
    run: Function, is_split: bool, rows: Rows, groups: PyTree
) -> Float[Array, "length width"]:
    """The weighted sums for this device's tokens over the groups of all devices along `expert`.

    Reverse mode computes the passes again, and keeps nothing but the arguments.

    **Arguments:**

    - `run`: the function of the rows of a pass, with the groups of this device.
    - `is_split`: whether each device along the axis has tokens of its own. Otherwise all have the
        same tokens.
    - `rows`, `groups`: those of this device.
    """
    sums: Any = _sums(run, is_split, rows, groups)
    return sums


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(run: Function, is_split: bool, rows: Rows, groups: PyTree) -> Array:
    x, chosen, weights = _gathered(rows, is_split)
    plan = _planned(chosen, _count(groups))

    def one_pass(number, sums):
        choice, token, group = plan.of_pass(number)
        y = _weighted(run, x[token], weights.reshape(-1)[choice], groups, group)
        return sums + plan.back(number, y).sum(axis=1)

    zeros = jnp.zeros(x.shape, weights.dtype)
    sums = _over_passes(plan, one_pass, zeros, (x, weights, groups))
    return _scattered(sums, is_split).astype(x.dtype)


def _forward(run: Function, is_split: bool, rows: Any, groups: Any) -> tuple[Array, Any]:
    """Arrays that are differentiated with respect to, and all others, are residuals apart."""
    rows = jax.tree.map(lambda x: x.value, rows)
    moved = jax.tree.map(lambda x: x.value if x.perturbed else None, groups)
    still = jax.tree.map(lambda x: None if x.perturbed else x.value, groups)
    result: Any = _sums(run, is_split, rows, eqx.combine(moved, still))
    return result, (rows, moved, still)


def _backward(run: Function, is_split: bool, residuals: Any, cotangent: Any) -> tuple[Any, Any]:
    rows, moved, still = residuals
    if isinstance(cotangent, SymbolicZero):
        cotangent = jnp.zeros_like(rows[0])
    gathered = _gathered((*rows, cotangent), is_split)
    (x, chosen, weights, cotangent), moved, still = vary_alike(gathered, moved, still)
    plan = _planned(chosen, _count((moved, still)))

    def one_pass(number, sums):
        choice, token, group = plan.of_pass(number)

        def result(x, weight, moved):
            return _weighted(run, x, weight, eqx.combine(moved, still), group)

        _, pull = jax.vjp(result, x[token], weights.reshape(-1)[choice], moved)
        in_x, in_weight, in_groups = pull(cotangent[token].astype(weights.dtype))
        of_tokens = plan.back(number, in_x.astype(sums[0].dtype)).sum(axis=1)
        found = of_tokens, plan.back(number, in_weight), in_groups
        return jax.tree.map(lambda total, y: total + y.astype(total.dtype), sums, found)

    wanted = x, weights, moved
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, at_least_float32(x.dtype)), wanted)
    in_x, in_weights, in_groups = _over_passes(plan, one_pass, zeros, (wanted, still))
    in_x, in_weights = _scattered(in_x, is_split), _scattered(in_weights, is_split)
    in_groups = jax.tree.map(lambda total, x: total.astype(x.dtype), in_groups, moved)
    return (in_x.astype(x.dtype), None, in_weights.astype(weights.dtype)), in_groups


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


class _Plan(NamedTuple):
    """The choices of all tokens, those of this device's groups first, in the order of the groups.

    - `choice`: their numbers in `(length, chosen)`, flat.
    - `group`: their groups here. A choice of another device's group has the number of groups.
    - `place`: the place of each choice in this order. Shape `(length, chosen)`.
    - `size`, `passes`: the choices of a pass, and how many passes each device runs.
    """

    choice: Int[Array, " choices"]
    group: Int[Array, " choices"]
    place: Int[Array, "length chosen"]
    size: int
    passes: Int[Array, ""]

    def of_pass(self, number: Int[Array, ""]) -> tuple[Array, Array, Array]:
        """The choices of a pass, their tokens and their groups."""
        start = number * self.size
        choice, group = (
            jax.lax.dynamic_slice_in_dim(x, start, self.size) for x in (self.choice, self.group)
        )
        return choice, choice // self.place.shape[1], group

    def back(self, number: Int[Array, ""], values: Array) -> Array:
        """For each choice of each token its entry in the values of a pass, and 0 if it has none."""
        at = self.place - number * self.size
        is_here = (at >= 0) & (at < self.size)
        # Not by a scatter of sums, which a GPU adds in a different order every time.
        found = values[jnp.clip(at, 0, self.size - 1)]
        is_here = is_here.reshape(*at.shape, *[1] * (found.ndim - at.ndim))
        return jnp.where(jnp.broadcast_to(is_here, found.shape), found, jnp.zeros_like(found))


def _planned(chosen: Int[Array, "length chosen"], groups: int) -> _Plan:
    """A pass has as many choices as each device has if all groups are chosen alike."""
    own = chosen.reshape(-1) - jax.lax.axis_index(EXPERT).astype(chosen.dtype) * groups
    is_own = (own >= 0) & (own < groups)
    group = jnp.where(is_own, own, groups)
    order = jnp.argsort(group, stable=True)
    parts = jax.lax.axis_size(EXPERT)
    size = -(-chosen.size // parts)
    padding = (0, size * parts - chosen.size)
    passes = (is_own.sum(dtype=chosen.dtype) + (size - 1)) // size
    # All devices run as many, since XLA may exchange parts over `tensor` between all of them in a
    # pass. It costs no time: the sums wait for the last device anyway.
    passes = jax.lax.pmax(passes, tuple(varying_axes(passes)))
    return _Plan(
        choice=jnp.pad(order, padding).astype(chosen.dtype),
        group=jnp.pad(group[order], padding, constant_values=groups),
        place=jnp.argsort(order).astype(chosen.dtype).reshape(chosen.shape),
        size=size,
        passes=passes,
    )


def _weighted(run: Function, x: Array, weight: Array, groups: PyTree, group: Array) -> Array:
    """The weighted results of choices of this device's groups, and 0 for other choices."""
    y = weight[:, None] * run(x, group, groups).astype(weight.dtype)
    is_own = jnp.broadcast_to((group < _count(groups))[:, None], y.shape)
    return jnp.where(is_own, y, jnp.zeros_like(y))


def _count(groups: PyTree) -> int:
    return jax.tree.leaves(groups)[0].shape[0]


def _over_passes(plan: _Plan, one_pass: Callable[[Array, Any], Any], zeros: Any, like: Any) -> Any:
    """The sums of `one_pass` over all passes."""
    start = vary_alike(zeros, plan.place, like)[0]
    return jax.lax.fori_loop(jnp.zeros_like(plan.passes), plan.passes, one_pass, start)


def _gathered(rows: tuple[Array, ...], is_split: bool) -> tuple[Array, ...]:
    """The tokens of all devices along `expert`."""
    if not is_split:
        return rows
    return tuple(jax.lax.all_gather(x, EXPERT, tiled=True) for x in rows)


def _scattered(sums: Array, is_split: bool) -> Array:
    """The sums of all devices for this device's tokens: the transpose of `_gathered`."""
    if not is_split:
        return jax.lax.psum(sums, EXPERT)
    return jax.lax.psum_scatter(sums, EXPERT, tiled=True)
