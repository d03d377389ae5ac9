"""Chooses sizes and kernels by the platform that a program is compiled for.

`jax.default_backend()` says nothing about that: the same function may be compiled for a device
that this process does not have, or be exported for several platforms.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import jax

Plan = TypeVar("Plan", bound=Hashable)
Returned = TypeVar("Returned")

# The platforms that plans may differ for, as JAX names them; all others share one plan.
CPU, CUDA, OTHER = "cpu", "cuda", "other"

# Whether the devices that are compiled for have cuDNN's attention kernel, if it is known.
_KERNEL: ContextVar[bool | None] = ContextVar("_KERNEL", default=None)
# The version of cuDNN that JAX sees for devices that are not there: 9.12.
_CUDNN_VERSION = 91200


def by_platform(
    plan_for: Callable[[str], Plan], run: Callable[..., Returned], *operands: Any
) -> Returned:
    """`run(plan, *operands)`, with the plan for the platform that the program is compiled for.

    A program for one platform has no trace of the other plans. Derivatives must not go through
    the choice, since it would keep the residuals of all plans: give `custom_jvp` rules that choose
    for themselves.

    **Arguments:**

    - `plan_for`: the plan for `CPU`, `CUDA` or `OTHER`. If all three are equal, there is no choice.
    - `run`: results have the same shapes and dtypes for all plans.
    - `operands`: pytrees of arrays.
    """
    plans = {name: plan_for(name) for name in (CPU, CUDA, OTHER)}
    default = plans.pop(OTHER)
    # JAX joins branches that are the same object.
    runs = {plan: partial(run, plan) for plan in plans.values() if plan != default}
    special = {name: runs[plan] for name, plan in plans.items() if plan != default}
    if not special:
        return run(default, *operands)
    return jax.lax.platform_dependent(*operands, default=partial(run, default), **special)


def assumed_kernel() -> bool | None:
    """What `assume_kernel` says; `None` outside of it."""
    return _KERNEL.get()


@contextlib.contextmanager
def assume_kernel(is_there: bool | None) -> Iterator[None]:
    """Programs traced inside are for devices with cuDNN's attention kernel, or without it.

    With `None` the devices of this process are asked, as outside.

    To trace the kernel, JAX asks the devices of this process for the version of cuDNN, and has no
    public way to answer for others.
    """
    token = _KERNEL.set(is_there)
    try:
        with _as_if_cudnn_were_here() if is_there else contextlib.nullcontext():
            yield
    finally:
        _KERNEL.reset(token)


@contextlib.contextmanager
def _as_if_cudnn_were_here() -> Iterator[None]:
    from jax._src.cudnn import fused_attention_stablehlo as kernel

    ask = kernel.check_cudnn_version
    kernel.check_cudnn_version = lambda: _CUDNN_VERSION
    try:
        yield
    finally:
        kernel.check_cudnn_version = ask
