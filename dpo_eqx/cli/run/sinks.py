"""Sinks of metrics and of samples: JSON Lines, TensorBoard, Weights & Biases.

A sink takes a step and a dictionary of numbers, or a step and the answers to some prompts. Others
make them: `late_metrics.py` and `samples.py`.
"""

import contextlib
import html
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ..._extras import require
from ..settings.settings import Settings
from ..settings.yaml_file import differences
from . import growing
from .folder import Folder, replace_text

Numbers = Mapping[str, float]
Sink = Callable[[int, Numbers], None]
# A line for each prompt; `samples.py` says what it holds.
Samples = Sequence[Mapping[str, Any]]
SampleSink = Callable[[int, Samples], None]
SAMPLE_COLUMNS = ("prompt", "answer", "reference")


# The package that each value of `--log` needs, and the extra that brings it.
_PACKAGES = {"tensorboard": ("tensorboardX", "train"), "wandb": ("wandb", "wandb")}


class Sinks(NamedTuple):
    """Where the numbers of training and of evaluations go, and samples."""

    training: Sink
    evaluation: Sink
    samples: SampleSink


def check_installed(settings: Settings) -> None:
    """Raises `ImportError` if a package that `--log` needs is missing, before the work begins."""
    for name in settings.log:
        _package(name)


def _package(name: str) -> ModuleType:
    module, extra = _PACKAGES[name]
    return require(module, extra=extra)


@contextlib.contextmanager
def open_sinks(settings: Settings, folder: Folder, start: int) -> Iterator[Sinks]:
    """The sinks of a run whose next step is after `start`.

    Lines after the step `start` are removed first. Their steps were lost when their process ended,
    and are run again.
    """
    with contextlib.ExitStack() as stack:
        shared: list[tuple[Sink, SampleSink]] = []
        if "tensorboard" in settings.log:
            shared.append(stack.enter_context(_tensorboard(folder, start)))
        if "wandb" in settings.log:
            shared.append(stack.enter_context(_wandb(settings, folder)))
        numbers = [sink for sink, _ in shared]
        lines = [
            stack.enter_context(json_lines(f, start)) for f in (folder.metrics, folder.evaluations)
        ]
        training, evaluation = (_all([own, *numbers]) for own in lines)
        samples = [stack.enter_context(_sample_lines(folder.samples, start))]
        yield Sinks(training, evaluation, _all(samples + [sink for _, sink in shared]))


@contextlib.contextmanager
def no_sinks() -> Iterator[Sinks]:
    """Sinks that write nothing, for processes other than the first."""
    yield Sinks(_all([]), _all([]), _all([]))


@contextlib.contextmanager
def json_lines(path: Path, start: int) -> Iterator[Sink]:
    """A JSON Lines file; each line is handed to the system before the next one is made."""
    cut_after(path, start)
    with growing.appending(path) as append:

        def write(step: int, numbers: Numbers) -> None:
            finite = {n: value if math.isfinite(value) else None for n, value in numbers.items()}
            append({"step": step, **finite})

        yield write


@contextlib.contextmanager
def _sample_lines(path: Path, start: int) -> Iterator[SampleSink]:
    """A JSON Lines file with a line for each step and prompt; without samples there is no file."""
    cut_after(path, start)

    def write(step: int, samples: Samples) -> None:
        with growing.appending(path) as append:
            for sample in samples:
                append({"step": step, **sample})

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
def _tensorboard(folder: Folder, start: int) -> Iterator[tuple[Sink, SampleSink]]:
    writer = _package("tensorboard").SummaryWriter(str(folder.tensorboard), purge_step=start + 1)

    def write(step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    def write_samples(step: int, samples: Samples) -> None:
        writer.add_text("samples", _as_markdown(samples), step)

    try:
        yield write, write_samples
    finally:
        writer.close()


@contextlib.contextmanager
def _wandb(settings: Settings, folder: Folder) -> Iterator[tuple[Sink, SampleSink]]:
    wandb = _package("wandb")
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

    def write_samples(step: int, samples: Samples) -> None:
        rows = [[step, *(sample[name] for name in SAMPLE_COLUMNS)] for sample in samples]
        table = wandb.Table(columns=["step", *SAMPLE_COLUMNS], data=rows)
        run.log({"samples": table}, step=step)

    try:
        yield write, write_samples
    finally:
        run.finish()


def _as_markdown(samples: Samples) -> str:
    """A table of samples, as TensorBoard shows texts; a cell shows its text as it is."""
    rows = [[str(sample[name] or "") for name in SAMPLE_COLUMNS] for sample in samples]
    lines = [SAMPLE_COLUMNS, ["---"] * len(SAMPLE_COLUMNS), *([*map(_cell, row)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """A text in one line of Markdown, without markup of its own."""
    return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")


def _all(sinks: list[Any]) -> Any:
    def write(step: int, numbers: Any) -> None:
        for sink in sinks:
            sink(step, numbers)

    return write
