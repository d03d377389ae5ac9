"""The line of metrics of each step, made one step late so that the host never waits for it.

`sinks.py` and `cli/terminal/display.py` write and show the line.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ..._arrays.batches import PreferenceBatch
from ..._arrays.packed import PackedBatch
from ..._scoring.predict import sizes_of
from ...data._records.values import ticked
from .sinks import Numbers, Sink

TOKENS = "tokens"
# TRL's name of the number of tokens read since the start of the run.
NUM_TOKENS = "num_tokens"
# The number of completions of each label, beside the metrics of a step on unpaired data.
SIDES = ("chosen", "rejected")
_COUNT = "count/"


class Lines:
    """Takes the metrics of a running step, and writes them when the next step has begun.

    **Arguments:**

    - `write`: a function of the step and its line.
    - `rates`: the learning rate of each step, from the first.
    - `tokens_before`: the number of tokens read before, if lines have it as `NUM_TOKENS`.
    """

    def __init__(self, write: Sink, rates: np.ndarray, tokens_before: float | None = None):
        self._write, self._rates, self._tokens_read = write, rates, tokens_before
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
        tokens, tokens_read = line.pop(TOKENS), line.pop(NUM_TOKENS, 0.0)
        if self._tokens_read is not None:
            self._tokens_read += tokens_read
            line[NUM_TOKENS] = self._tokens_read
        counts = {side: line.pop(_COUNT + side) for side in SIDES if _COUNT + side in line}
        line = without_sides(line, [side for side, count in counts.items() if not count])
        # A step that was dispatched early begins only when the previous one has ended.
        began, self._ended = max(began, self._ended), time.perf_counter()
        line["learning_rate"] = float(self._rates[step - 1])
        line["tokens_per_second"] = tokens / max(self._ended - began, 1e-9)
        self._write(step, line)
        _check_finite(step, line)


def tokens_of(batch: Any) -> Int[Array, ""]:
    """The tokens of rows with positive weight, over all processes; a pair's prompt counts once."""
    if isinstance(batch, PackedBatch):
        is_real = jnp.asarray(batch.weights) > 0
        return jnp.where(is_real, batch.lengths.sum(axis=-1), 0).sum(dtype=jnp.int32)
    pair = isinstance(batch, PreferenceBatch)
    parts = (
        (batch.prompt, batch.chosen, batch.rejected) if pair else (batch.prompt, batch.completion)
    )
    real = jnp.asarray(batch.weight) > 0
    counts = [jnp.sum(part.mask & real[:, None], dtype=jnp.int32) for part in parts]
    return jnp.stack(counts).sum(dtype=jnp.int32)


def tokens_read(batch: Any) -> Int[Array, ""]:
    """The tokens of rows with positive weight as TRL counts them; a pair's prompt counts twice."""
    if isinstance(batch, PackedBatch):
        is_real = jnp.asarray(batch.weights) > 0
        # The second sequence of a pair has the prompt, too.
        second = 0 if batch.labels is not None else batch.lengths[..., 0]
        read = batch.lengths.sum(axis=-1) + second
        return jnp.where(is_real, read, 0).sum(dtype=jnp.int32)
    pair = isinstance(batch, PreferenceBatch)
    completions = (batch.chosen, batch.rejected) if pair else (batch.completion,)
    real = jnp.asarray(batch.weight) > 0
    prompts = jnp.sum(batch.prompt.mask, axis=1, dtype=jnp.int32)
    rows = sum(prompts + sizes_of(completion) for completion in completions)
    return jnp.sum(jnp.where(real, rows, 0), dtype=jnp.int32)


def sides_of(batch: Any) -> dict[str, Int[Array, ""]]:
    """For unpaired data the completions of each label with positive weight; nothing for pairs."""
    if isinstance(batch, PreferenceBatch) or batch.label is None:
        return {}
    label, real = jnp.asarray(batch.label), jnp.asarray(batch.weight) > 0
    counts = (jnp.sum(real & side, dtype=jnp.int32) for side in (label, ~label))
    return {_COUNT + side: count for side, count in zip(SIDES, counts, strict=True)}


def without_sides(line: Mapping[str, float], absent: Sequence[str]) -> dict[str, float]:
    """`line` without the means over completions of a label that no row has: they are not 0."""
    names = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in absent}
    names |= {"rewards/margins"} if absent else set()
    return {name: value for name, value in line.items() if name not in names}


def _check_finite(step: int, line: Numbers) -> None:
    names = [name for name, value in line.items() if not math.isfinite(value)]
    if names:
        words = f"{ticked(names)} {'is' if len(names) == 1 else 'are'}"
        raise ValueError(
            f"{words} not finite at step {step}, so no checkpoint of this step was made. "
            f"{_remedy(step, names)}"
        )


def _remedy(step: int, names: Sequence[str]) -> str:
    """What to do about the metrics `names`, which are not finite at a step."""
    kinds = {name.partition("/")[0] for name in names}
    # A reward is the difference of the two log-probabilities, times a finite number.
    if "rewards" in kinds and "logps" not in kinds:
        return (
            "The log-probabilities of the policy are finite, so those of the reference are not. "
            "Give another `--reference`, or mend its log-probabilities in the data."
        )
    if step == 1:
        return (
            "No update came before, so the learning rate is not the cause: the model, its "
            "reference or the data already give it. Try `--compute-dtype float32`, look at the "
            "model with `dpo-eqx generate`, and at the rows with `dpo-eqx inspect`."
        )
    # The same settings give the same bits, and `--resume` refuses others.
    return (
        "`--resume` would come to the same. Start again with another `--output`, and with a lower "
        "`--learning-rate` or a longer warm-up, or without a row that is far longer than all "
        "others."
    )
