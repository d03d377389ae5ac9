"""What Optax transformations that take extra arguments are given: who takes what, and `value_fn`.

The objective itself is made in `step.py`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def differentiable(value: Callable, value_and_gradient: Callable) -> Callable:
    """`value`, whose derivative is the exact gradient over microbatches and devices.

    JAX's own would hold the residuals of all microbatches at once, and where `shard_map` does not
    track what varies it would not sum over devices.
    """
    function = jax.custom_jvp(value)

    @function.defjvp
    def derivative(params, tangents):
        mean, gradients = value_and_gradient(*params)
        # `vdot` conjugates its first argument: the change of a real value, d/dx and d/dy together.
        slope = optax.tree.vdot(gradients, *tangents)
        return mean, jnp.real(slope).astype(mean.dtype)

    # Sophia calls it `obj_fn`. Optax's line searches refuse what `value_fn` does not take.
    return lambda params, obj_fn=None: function(params)


def taken_by(optimizer: optax.GradientTransformation, make: Callable[[], dict]) -> dict[str, Any]:
    """Of the extra arguments that `make` makes those that the optimiser's update takes."""
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return {}
    names = inspect.signature(optimizer.update).parameters
    if any(taken.kind is inspect.Parameter.VAR_KEYWORD for taken in names.values()):
        return make()
    # SAM's takes arguments of its own, and no others.
    return {name: value for name, value in make().items() if name in names}
