"""The optimiser of a run, its learning rate, and the number of its steps."""

import dataclasses
from typing import Literal

OPTIMIZERS = ("adamw", "sgd", "adafactor", "lion", "muon", "schedule_free_adamw")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """How it is minimised, and for how long."""

    steps: int | None = None
    """Largest number of optimiser steps (default: set by `--epochs`)."""
    epochs: int | None = None
    """Largest number of passes through the data (default: 1, or no limit if `--steps` is given)."""
    batch_size: int = 8
    """Pairs per optimiser step, over all microbatches."""
    microbatches: int = 1
    """Number of parts that a batch is split into to save memory. The result stays the same."""
    learning_rate: float = 1e-6
    """Peak learning rate. About 1e-6 suits a whole model, 1e-5 to 1e-4 suits LoRA."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] | None = None
    """Learning rate after the warm-up (default: linear, or constant if `--optimizer` is
    schedule_free_adamw). linear and cosine end at `--min-learning-rate`, and so does wsd, which is
    constant before its last `--decay-steps`."""
    min_learning_rate: float = 0.0
    """The learning rate at the end of `--schedule` linear, cosine and wsd; inverse_sqrt does not
    fall below it."""
    decay_steps: int | None = None
    """Number of steps in which the learning rate falls at the end of `--schedule wsd` (default: a
    tenth of all steps)."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises from 0 to its peak."""
    warmup_ratio: float | None = None
    """Fraction of all steps in which the learning rate rises, in place of `--warmup-steps`."""
    optimizer: str = "adamw"
    """Name of the optimiser: adamw, sgd (without momentum), adafactor, lion, muon or
    schedule_free_adamw. Your own is `module:function` or `file.py:function`, a function from the
    learning-rate schedule to an `optax.GradientTransformation`."""
    weight_decay: float = 0.0
    """Weight decay of all parameters except biases and norms."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 switches clipping off."""
    dropout: bool = False
    """Apply the model's own dropout in training. TRL switches it off, too."""
    seed: int = 0
    """Random seed of the data order, of new adapters and of dropout."""


def schedule_of(flags: OptimizerFlags) -> str:
    """The name of the schedule: the given one, or the default of the optimiser."""
    default = "constant" if flags.optimizer == "schedule_free_adamw" else "linear"
    return flags.schedule or default
