"""Functions whose code is chosen, and traced, when a program is lowered for a platform.

`by_platform.py` chooses between sizes, and traces the code of all of them. That does not suit
kernels: to trace one takes long, and may need libraries that only machines with the device have.
"""

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from .by_platform import CPU, CUDA, OTHER, TPU
from .in_turns import in_turns
from .mapped_axes import vary_alike

# The name of the equations of `by_rule` in a jaxpr.
RULE = "dpo_eqx_by_rule"


class Where(NamedTuple):
    """What a program is lowered for.

    - `platform`: `CPU`, `CUDA`, `TPU` or `OTHER`.
    - `devices`: the number of devices that run the program together.
    - `axes`: the axes of the mesh over which a `vmap` around the call splits.
    """

    platform: str
    devices: int = 1
    axes: frozenset[Hashable] = frozenset()


@runtime_checkable
class Rule(Protocol):
    """A function for each platform. Rules that are equal must have the same code."""

    def __hash__(self) -> int: ...

    def shapes(self, *operands: jax.ShapeDtypeStruct) -> Sequence[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of the results, the same for all platforms."""
        ...

    def at_once(self, where: Where, *operands: jax.ShapeDtypeStruct) -> float:
        """About how many calls of `run` under a `vmap` run at once; infinite for all of them."""
        ...

    def run(self, where: Where, *operands: Array) -> Sequence[Array]:
        """The results, by the code for the platform."""
        ...


@runtime_checkable
class Differentiable(Protocol):
    """A rule with derivatives."""

    def differentiable(self, *operands: Array) -> Sequence[Array]:
        """The results by a function that has derivatives, such as a `custom_jvp` with this rule."""
        ...


class Sweep(NamedTuple):
    """A `vmap` around a call: which operands have its axis, in front, and its `spmd_axis_name`."""

    has_axis: tuple[bool, ...]
    axes: tuple[Hashable, ...]


def by_rule(rule: Rule, *operands: Array) -> list[Array]:
    """The results of `rule` on the platform that the program is lowered for.

    Call it inside a `custom_jvp` function or its rule. JAX forgets that function if it transposes,
    so for higher derivatives the rule must be `Differentiable`.
    """
    return _by_rule.bind(*vary_alike(*operands), rule=rule, sweeps=())


def traced_rule(equation: Any, platform: str) -> Any:
    """The jaxpr that an equation of `by_rule` stands for on a platform."""
    run = functools.partial(_run, Where(platform), **equation.params)
    return jax.make_jaxpr(run)(*(x.aval for x in equation.invars))


def _run(
    where: Where, *operands: Array, rule: Rule, sweeps: tuple[Sweep, ...]
) -> tuple[Array, ...]:
    """The code for one platform, under all of the `vmap`s, the outermost first in `sweeps`."""
    where = where._replace(axes=frozenset(name for sweep in sweeps for name in sweep.axes))

    def run(*operands):
        return tuple(rule.run(where, *operands))

    sizes, inner = _shapes(sweeps, operands)
    most = rule.at_once(where, *inner)
    if most == math.inf:
        return _swept(run, sweeps)(*operands)
    for size, (has_axis, _) in zip(reversed(sizes), reversed(sweeps), strict=True):
        run = in_turns(run, most, [0 if has else None for has in has_axis])
        most = most / size
    return run(*operands)


def _types(*operands: ShapedArray, rule: Rule, sweeps: tuple[Sweep, ...]) -> list[ShapedArray]:
    sizes, inner = _shapes(sweeps, operands)

    def whole(result):
        shape = (*sizes, *result.shape)
        where = operands[0].sharding.update(spec=P(*[None] * len(shape)))
        return operands[0].update(shape=shape, dtype=result.dtype, weak_type=False, sharding=where)

    return [whole(result) for result in rule.shapes(*inner)]


def _shapes(
    sweeps: Sequence[Sweep], operands: Sequence[Array | ShapedArray]
) -> tuple[tuple[int, ...], list[jax.ShapeDtypeStruct]]:
    """The sizes of the sweeps' axes, and the operands of one call."""
    sizes = tuple(
        next(x.shape[i] for x, i in zip(operands, depths, strict=True) if i is not None)
        for depths in zip(*_depths(sweeps, len(operands)), strict=True)
    )
    inner = [
        jax.ShapeDtypeStruct(x.shape[sum(sweep.has_axis[i] for sweep in sweeps) :], x.dtype)
        for i, x in enumerate(operands)
    ]
    return sizes, inner


def _depths(sweeps: Sequence[Sweep], operands: int) -> Iterator[list[int | None]]:
    """For each operand, the place of each sweep's axis in its shape; `None` if it has none."""
    for i in range(operands):
        places, place = [], 0
        for sweep in sweeps:
            places.append(place if sweep.has_axis[i] else None)
            place += sweep.has_axis[i]
        yield places


def _batch(axis_data, operands, dims, *, rule, sweeps):
    has_axis = tuple(dim is not None for dim in dims)
    # Under a scan of which other operands have the axis.
    if not any(has_axis):
        results = _by_rule.bind(*operands, rule=rule, sweeps=sweeps)
        return results, [None] * len(results)
    operands = [
        x if dim is None else jax.numpy.moveaxis(x, dim, 0)
        for x, dim in zip(operands, dims, strict=True)
    ]
    names = axis_data.spmd_name or ()
    sweep = Sweep(has_axis, names if isinstance(names, tuple) else (names,))
    results = _by_rule.bind(*operands, rule=rule, sweeps=(sweep, *sweeps))
    return results, [0] * len(results)


def _jvp(primals, tangents, *, rule, sweeps):
    # Rules of backward passes have none: `with_transpose` differentiates the forward pass instead.
    if not isinstance(rule, Differentiable):
        raise NotImplementedError(f"{rule} has no derivative.")
    run = _swept(rule.differentiable, sweeps)
    return jax.jvp(run, primals, tuple(map(ad.instantiate_zeros, tangents)))


def _swept(run: Callable[..., Any], sweeps: Sequence[Sweep]) -> Callable[..., Any]:
    """`run` under all of the `vmap`s, the outermost first in `sweeps`."""
    for has_axis, names in reversed(sweeps):
        in_axes = tuple(0 if has else None for has in has_axis)
        run = jax.vmap(run, in_axes, spmd_axis_name=names or None)
    return run


def _lower(platform, ctx, *operands, **parameters):
    # The number is not in the context of a `shard_map`, whose code is for one device.
    devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
    run = functools.partial(_run, Where(platform, devices))
    return mlir.lower_fun(run)(ctx, *operands, **parameters)


@functools.partial(jax.jit, static_argnames=("rule", "sweeps"))
def _run_now(*operands, rule, sweeps):
    return _by_rule.bind(*operands, rule=rule, sweeps=sweeps)


_by_rule = Primitive(RULE)
_by_rule.multiple_results = True
_by_rule.def_impl(_run_now)
_by_rule.def_abstract_eval(_types)
ad.primitive_jvps[_by_rule] = _jvp
batching.fancy_primitive_batchers[_by_rule] = _batch
mlir.register_lowering(_by_rule, functools.partial(_lower, OTHER))
for _platform in (CPU, CUDA, TPU):
    mlir.register_lowering(_by_rule, functools.partial(_lower, _platform), platform=_platform)
