"""From settings to the optimiser and its learning rate, by the conventions of TRL's trainers.

The warm-up starts at 0, and biases and norms do not decay. The step itself is not made here.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jaxtyping import Float, PyTree

from ..._jax.describe import described
from ..._jax.paths import leaf_name
from ..settings.groups.optimizer import schedule_of
from ..settings.options import is_function
from ..settings.settings import Settings
from .functions import load_function


def compose_schedule(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of steps taken, for a run of `steps` steps.

    **Raises:**

    `ValueError` if the decay is longer than the steps that the warm-up leaves.
    """
    warmup = _warmup_steps(settings, steps)
    # At least 1, since Optax divides by it even if all steps are warm-up.
    rest = max(steps - warmup, 1)
    rate, floor = settings.learning_rate, settings.min_learning_rate
    after_warmup = {
        "constant": lambda: optax.constant_schedule(rate),
        "linear": lambda: optax.linear_schedule(rate, floor, rest),
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest, alpha=floor / rate),
        # 10,000 is what `transformers` takes without a warm-up.
        "inverse_sqrt": lambda: _inverse_sqrt(rate, floor, warmup or 10_000),
        "wsd": lambda: _stable_then_decay(rate, floor, rest, _decay_steps(settings, steps, rest)),
    }[schedule_of(settings)]()
    if not warmup:
        return after_warmup
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after_warmup], [warmup])


def _warmup_steps(settings: Settings, steps: int) -> int:
    if settings.warmup_ratio is None:
        return settings.warmup_steps
    return math.ceil(settings.warmup_ratio * steps)


def _decay_steps(settings: Settings, steps: int, rest: int) -> int:
    if settings.decay_steps is None:
        return min(math.ceil(steps / 10), rest)
    if settings.decay_steps > rest:
        raise ValueError(
            f"`--decay-steps` must be at most the {rest} steps after the warm-up; got "
            f"{settings.decay_steps}. Give a shorter decay, or more `--steps`."
        )
    return settings.decay_steps


def _stable_then_decay(rate: float, floor: float, steps: int, decay: int) -> optax.Schedule:
    falling = optax.linear_schedule(rate, floor, decay)
    return optax.join_schedules([optax.constant_schedule(rate), falling], [steps - decay])


def _inverse_sqrt(rate: float, floor: float, timescale: int) -> optax.Schedule:
    return lambda count: jnp.maximum(rate / jnp.sqrt(1 + count / timescale), floor)


def learning_rates(schedule: optax.Schedule, steps: int) -> Float[np.ndarray, " steps"]:
    """The learning rates of all steps for the log, in float64, so that 0.001 is logged as 0.001."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        rates = jax.vmap(schedule)(np.arange(steps, dtype=np.int64))
    # A constant schedule returns a Python number, not one rate for each step.
    return np.broadcast_to(np.asarray(rates, np.float64), (steps,))


def compose_optimizer(settings: Settings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimiser, which gets gradients after clipping.

    **Raises:**

    `ValueError` if `--optimizer` names a function that is not found or returns no optimiser.
    """
    clip = (optax.clip_by_global_norm(settings.max_grad_norm),) if settings.max_grad_norm else ()
    return optax.chain(*clip, *_rule(settings, schedule))


def _rule(settings: Settings, schedule: optax.Schedule) -> tuple[optax.GradientTransformation, ...]:
    """What the optimiser does to clipped gradients, step by step."""
    if is_function(settings.optimizer):
        return (_own(settings.optimizer, schedule),)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decays)
    by_rate = optax.scale_by_learning_rate(schedule)
    if settings.optimizer == "schedule_free_adamw":
        # Adam without momentum, in place of which the method averages the parameters.
        second_moment = optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)
        base = optax.chain(second_moment, decay, by_rate)
        return (optax.contrib.schedule_free(base, schedule),)
    direction = {
        # Without momentum, as TRL makes `torch.optim.SGD`: the decay is added to the gradient.
        "sgd": (),
        "adamw": (optax.scale_by_adam(),),
        "lion": (optax.scale_by_lion(),),
        # `optax.adafactor` does not scale the decay by the learning rate; TRL's Adafactor does.
        "adafactor": (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "muon": (_muon(),),
    }[settings.optimizer]
    return (*direction, decay, by_rate)


def _own(named: str, schedule: optax.Schedule) -> optax.GradientTransformation:
    optimizer = load_function(named, "--optimizer")(schedule)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"`--optimizer {named}` must name a function from the learning-rate schedule to an "
            f"`optax.GradientTransformation`; it returned {described(optimizer)}. Return an "
            "optimiser such as `optax.adamw(schedule)`."
        )
    return optimizer


def _muon() -> optax.GradientTransformation:
    """Muon for the matrices of the layers, and Adam for all other parameters."""

    def labels(params: PyTree) -> PyTree:
        return jax.tree.map(lambda is_matrix: "muon" if is_matrix else "adam", matrices(params))

    # Weights are stored as (out, in). Layers and experts are in front; each is a matrix of its own.
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    orthogonal = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: axes, updates)
    )
    muon = optax.chain(orthogonal, optax.stateless(_as_large_as_adam))
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam()}, labels)


def _as_large_as_adam(updates: PyTree, _: PyTree) -> PyTree:
    """Scales orthogonal updates to Adam's usual root mean square of 0.2.

    So one learning rate suits the matrices and all other parameters: Liu et al., "Muon is Scalable
    for LLM Training", 2025, equation 4.
    """
    return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates)


def matrices(params: PyTree) -> PyTree:
    """A pytree of booleans: true for the weights of linear layers, stacked over the layers.

    Embeddings, heads, norms, biases, and the kernels of convolutions are false.
    """

    def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
        name = leaf_name(path)
        # Behind the axis of layers, a matrix has two axes and a vector has one.
        has_axes = leaf.ndim > 2 and min(leaf.shape[-2:]) > 1
        return has_axes and "layers" in name.split(".") and _is_decayed(name)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def decays(params: PyTree) -> PyTree:
    """A pytree of booleans: true for arrays that decay, which biases and norms do not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_decayed(leaf_name(path)), params)


def _is_decayed(name: str) -> bool:
    return "norm" not in name and not name.endswith("bias")
