"""From settings to the optimiser and its learning rate, by the conventions of TRL's trainers.

The warm-up rises from 0, linear and cosine end at 0, and biases and norms do not decay.
"""

import jax
import numpy as np
import optax
from jaxtyping import Float, PyTree

from ..._jax.paths import leaf_name
from ..settings.settings import Settings


def compose_schedule(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate of each step, from 0, of `steps` in all."""
    rate, warmup = settings.learning_rate, settings.warmup_steps
    # At least 1, where all is warm-up: there is nothing after it to be divided.
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(rate, rest),
    }[settings.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup])


def learning_rates(schedule: optax.Schedule, steps: int) -> Float[np.ndarray, " steps"]:
    """The learning rates of all steps, to be logged: in float64, so that 0.001 is 0.001."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        rates = jax.vmap(schedule)(np.arange(steps, dtype=np.int64))
    # A constant one is a Python number to Optax, whatever the count.
    return np.broadcast_to(np.asarray(rates, np.float64), (steps,))


def compose_optimizer(settings: Settings, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimiser, behind the clipping of gradients."""
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decays)
    rule = {
        # Not momentum, nor Nesterov's: `torch.optim.SGD` as TRL makes it, whose decay comes first.
        "sgd": (decay,),
        "adamw": (optax.scale_by_adam(), decay),
        "lion": (optax.scale_by_lion(), decay),
        # `optax.adafactor` does not scale the decay by the learning rate, that of TRL does.
        "adafactor": (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), decay),
    }[settings.optimizer]
    clip = (optax.clip_by_global_norm(settings.max_grad_norm),) if settings.max_grad_norm else ()
    return optax.chain(*clip, *rule, optax.scale_by_learning_rate(schedule))


def decays(params: PyTree) -> PyTree:
    """True where weights decay: not in biases, nor in norms."""

    def is_decayed(path, _):
        name = leaf_name(path)
        return "norm" not in name and not name.endswith("bias")

    return jax.tree_util.tree_map_with_path(is_decayed, params)
