"""Chooses sizes by the platform that a program is compiled for. `platform_rules.py` has kernels.

`jax.default_backend()` says nothing about that: the same function may be compiled for a device
that this process does not have, or be exported for several platforms.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar

import jax

Plan = TypeVar("Plan", bound=Hashable)
Returned = TypeVar("Returned")

# The platforms as JAX names them; `OTHER` is all others. Sizes for a TPU are those of `OTHER`.
CPU, CUDA, TPU, OTHER = "cpu", "cuda", "tpu", "other"


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
