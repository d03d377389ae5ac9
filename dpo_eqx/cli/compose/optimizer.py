"""From settings to the optimiser and its learning rate, by the conventions of TRL's trainers.

The warm-up starts at 0, linear and cosine schedules end at 0, and biases and norms do not decay.
"""

from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float, PyTree

from ..._jax.paths import leaf_name
from ..settings.settings import Settings


def compose_schedule(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of steps taken, for a run of `steps` steps."""
    rate, warmup = settings.learning_rate, settings.warmup_steps
    # At least 1, since Optax divides by it even if all steps are warm-up.
    decay_steps = max(steps - warmup, 1)
    decay = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(rate, decay_steps),
    }[settings.schedule]
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), decay], [warmup])


def learning_rates(schedule: optax.Schedule, steps: int) -> Float[np.ndarray, " steps"]:
    """The learning rates of all steps for the log, in float64, so that 0.001 is logged as 0.001."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        rates = jax.vmap(schedule)(np.arange(steps, dtype=np.int64))
    # A constant schedule returns a Python number, not one rate for each step.
    return np.broadcast_to(np.asarray(rates, np.float64), (steps,))


def compose_optimizer(settings: Settings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimiser, which gets gradients after clipping."""
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decays)
    rule = {
        # Without momentum, as TRL makes `torch.optim.SGD`: the decay is added to the gradient.
        "sgd": (decay,),
        "adamw": (optax.scale_by_adam(), decay),
        "lion": (optax.scale_by_lion(), decay),
        # `optax.adafactor` does not scale the decay by the learning rate; TRL's Adafactor does.
        "adafactor": (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), decay),
    }[settings.optimizer]
    clip = (optax.clip_by_global_norm(settings.max_grad_norm),) if settings.max_grad_norm else ()
    return optax.chain(*clip, *rule, optax.scale_by_learning_rate(schedule))


def decays(params: PyTree) -> PyTree:
    """A pytree of booleans: true for arrays that decay, which biases and norms do not."""

    def is_decayed(path: tuple[Any, ...], _: Any) -> bool:
        name = leaf_name(path)
        return "norm" not in name and not name.endswith("bias")

    return jax.tree_util.tree_map_with_path(is_decayed, params)
