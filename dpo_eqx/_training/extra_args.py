"""The extra arguments of some optimisers: the value of the loss, and a function that computes it.

The objective itself is in `passes.py`.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .objective import Scored, mean_loss
from .passes import Problem, gradient, objective_at


def extra_args(
    optimizer: optax.GradientTransformation,
    problem: Problem,
    gradients: PyTree,
    pairs: Scored,
    losses: Any,
) -> dict[str, Any]:
    """The arguments among `value`, `grad`, `value_fn` and `obj_fn` that the optimiser accepts.

    Nothing is computed if it accepts none. `value_fn` is traced only if the optimiser calls it.

    **Arguments:**

    - `optimizer`: the optimiser, whose `update` is inspected.
    - `problem`: the problem of this step.
    - `gradients`, `pairs`, `losses`: the results of `gradient` at the current parameters.
    """
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return {}
    # The reference's log-probabilities do not depend on the parameters.
    rows = problem.rows._replace(reference=pairs.reference)
    value_fn = _differentiable(dataclasses.replace(problem, rows=rows))
    value = mean_loss(pairs, losses, problem.setup.axis_name)
    offered = {"value": value, "grad": gradients, "value_fn": value_fn, "obj_fn": value_fn}
    parameters = inspect.signature(optimizer.update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return offered
    # Sharpness-Aware Minimization (SAM), for example, refuses all but its own extra arguments.
    return {name: argument for name, argument in offered.items() if name in parameters}


def _differentiable(problem: Problem) -> Callable:
    """The mean loss as a function of the parameters, whose derivative is the exact gradient.

    JAX's own derivative would hold the residuals of all microbatches at once. Under a `shard_map`
    with `check_vma=False`, it would also miss the sum over devices.
    """
    function = jax.custom_jvp(lambda params: objective_at(problem, params))

    @function.defjvp
    def derivative(params, tangents):
        gradients, pairs, losses = gradient(problem, *params)
        mean = mean_loss(pairs, losses, problem.setup.axis_name)
        # `vdot` conjugates its first argument, so real and imaginary parts both count.
        slope = optax.tree.vdot(gradients, *tangents)
        return mean, jnp.real(slope).astype(mean.dtype)

    # Sophia passes `obj_fn` to this function. Optax's line searches raise if an argument is passed
    # that this function does not take.
    return lambda params, obj_fn=None: function(params)
