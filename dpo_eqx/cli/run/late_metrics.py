"""The line of metrics of each step, made one step late so that the host never waits for it.

`sinks.py` and `cli/terminal/display.py` write and show the line.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ..._arrays.batches import PreferenceBatch
from .sinks import Numbers, Sink

TOKENS = "tokens"


class Lines:
    """Takes the metrics of a running step, and writes them when the next step has begun.

    **Arguments:**

    - `write`: a function of the step and its line.
    - `rates`: the learning rate of each step, from the first.
    """

    def __init__(self, write: Sink, rates: np.ndarray):
        self._write, self._rates = write, rates
        self._waiting: tuple[int, Mapping[str, Any], float] | None = None
        self._ended = 0.0

    def add(self, step: int, metrics: Mapping[str, Any], began: float) -> None:
        """The metrics of a step, which need not be computed yet.

        **Arguments:**

        - `step`: the step, from 1; `metrics`: scalars, including the batch's tokens as `TOKENS`.
        - `began`: the time at which the step began, in seconds of `time.perf_counter`.
        """
        self.flush()
        self._waiting = step, metrics, began
        # If the backend runs steps synchronously, the metrics are ready: waiting gains nothing.
        if all(value.is_ready() for value in metrics.values()):
            self.flush()

    def flush(self) -> None:
        """Writes the waiting line, as soon as it is computed.

        **Raises:**

        `ValueError` if a number in it is not finite: the parameters after that step are worthless.
        """
        if self._waiting is None:
            return
        (step, metrics, began), self._waiting = self._waiting, None
        line = {name: float(value) for name, value in metrics.items()}
        tokens = line.pop(TOKENS)
        # A step that was dispatched early begins only when the previous one has ended.
        began, self._ended = max(began, self._ended), time.perf_counter()
        line["learning_rate"] = float(self._rates[step - 1])
        line["tokens_per_second"] = tokens / max(self._ended - began, 1e-9)
        self._write(step, line)
        _check_finite(step, line)


def tokens_of(batch: Any) -> Int[Array, ""]:
    """The tokens of rows with positive weight, over all processes; a pair's prompt counts once."""
    pair = isinstance(batch, PreferenceBatch)
    parts = (
        (batch.prompt, batch.chosen, batch.rejected) if pair else (batch.prompt, batch.completion)
    )
    real = jnp.asarray(batch.weight) > 0
    counts = [jnp.sum(part.mask & real[:, None], dtype=jnp.int32) for part in parts]
    return jnp.stack(counts).sum(dtype=jnp.int32)


def _check_finite(step: int, line: Numbers) -> None:
    names = [name for name, value in line.items() if not math.isfinite(value)]
    if names:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in names)} is not finite at step {step}, so "
            "no checkpoint of this step was made. Lower `--learning-rate`, warm up longer, or "
            "look for a row that is far larger than all others."
        )
