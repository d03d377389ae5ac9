"""The optimiser of a run, and the number of its steps."""

import dataclasses
from typing import Literal


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
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Number of steps in which the learning rate rises from 0 to its peak."""
    optimizer: Literal["adamw", "sgd", "adafactor", "lion"] = "adamw"
    """The Optax optimiser; sgd has no momentum."""
    weight_decay: float = 0.0
    """Weight decay of all parameters except biases and norms."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 switches clipping off."""
    dropout: bool = False
    """Apply the model's own dropout in training. TRL switches it off, too."""
    seed: int = 0
    """Random seed of the data order, of new adapters and of dropout."""
