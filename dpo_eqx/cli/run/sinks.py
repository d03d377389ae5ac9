"""Sinks of metrics: JSON Lines, TensorBoard, Weights & Biases.

Each sink takes a step and a dictionary of numbers; `late_metrics.py` makes the numbers.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..._extras import require
from ..settings.settings import Settings
from ..settings.yaml_file import differences
from . import growing
from .folder import Folder, replace_text

Numbers = Mapping[str, float]
Sink = Callable[[int, Numbers], None]


@contextlib.contextmanager
def open_sinks(settings: Settings, folder: Folder, start: int) -> Iterator[tuple[Sink, Sink]]:
    """Two functions of a step and its numbers: one for training, one for evaluation.

    Lines after the step `start` are removed first. Their steps were lost when their process ended,
    and are run again.
    """
    with contextlib.ExitStack() as stack:
        shared: list[Sink] = []
        if "tensorboard" in settings.log:
            shared.append(stack.enter_context(_tensorboard(folder, start)))
        if "wandb" in settings.log:
            shared.append(stack.enter_context(_wandb(settings, folder)))
        lines = [
            stack.enter_context(json_lines(f, start)) for f in (folder.metrics, folder.evaluations)
        ]
        training, evaluation = (_all([own, *shared]) for own in lines)
        yield training, evaluation


@contextlib.contextmanager
def no_sinks() -> Iterator[tuple[Sink, Sink]]:
    """Two sinks that write nothing, for processes other than the first."""
    yield _all([]), _all([])


@contextlib.contextmanager
def json_lines(path: Path, start: int) -> Iterator[Sink]:
    """A JSON Lines file; each line is handed to the system before the next one is made."""
    cut_after(path, start)
    with growing.appending(path) as append:

        def write(step: int, numbers: Numbers) -> None:
            finite = {n: value if math.isfinite(value) else None for n, value in numbers.items()}
            append({"step": step, **finite})

        yield write


def cut_after(path: Path, step: int) -> None:
    """Removes the lines after a step from the file, and a line that is only half written."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_up_to(line, step)]
    if kept != lines:
        replace_text(path, "".join(kept))


def _is_up_to(line: str, step: int) -> bool:
    with contextlib.suppress(ValueError):
        return line.endswith("\n") and json.loads(line)["step"] <= step
    return False


@contextlib.contextmanager
def _tensorboard(folder: Folder, start: int) -> Iterator[Sink]:
    tensorboard = require("tensorboardX", extra="train")
    writer = tensorboard.SummaryWriter(str(folder.tensorboard), purge_step=start + 1)

    def write(step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    try:
        yield write
    finally:
        writer.close()


@contextlib.contextmanager
def _wandb(settings: Settings, folder: Folder) -> Iterator[Sink]:
    wandb = require("wandb", extra="wandb")
    given = {name: value for name, (_, value) in differences(settings, {}).items()}
    began = folder.starts()[0]["time"]
    run = wandb.init(
        project="dpo-eqx",
        name=folder.path.name,
        dir=str(folder.path),
        config={name: str(value) for name, value in given.items()},
        # The same id for all parts of one run, and another for every other run.
        id="".join(c for c in f"{folder.path.name}-{began}" if c.isalnum() or c == "-"),
        resume="allow",
    )

    def write(step: int, numbers: Numbers) -> None:
        run.log(dict(numbers), step=step)

    try:
        yield write
    finally:
        run.finish()


def _all(sinks: list[Sink]) -> Sink:
    def write(step: int, numbers: Any) -> None:
        for sink in sinks:
            sink(step, numbers)

    return write
