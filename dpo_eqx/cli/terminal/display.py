"""The progress of a run: a bar on a terminal, plain lines elsewhere.

Numbers come as dictionaries; nothing here computes them.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping

from ..._extras import require
from ..settings.goal import prefix

Show = Callable[[int, Mapping[str, float]], None]

COLUMNS = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "win_rate": "win rate",
    "reward": "reward",
    "kl": "KL",
}
# The number of plain lines in a run, not counting the first and the last.
_LINES = 20


def say(text: str) -> None:
    """Prints a line at once, also into a pipe. On a terminal it appears above the bar."""
    print(text, flush=True)


@contextlib.contextmanager
def display(start: int, steps: int, *, what: str = "step") -> Iterator[Show]:
    """Gives a function `show(step, numbers)` for the steps after `start`, up to `steps`."""
    if sys.stdout.isatty():
        with _bar(start, steps) as show:
            yield show
        return
    # Monotonic: the time left must not jump if the system's clock is set.
    clock = time.monotonic()
    every = max(1, steps // _LINES)

    def tell(step: int, numbers: Mapping[str, float]) -> None:
        if step in (start + 1, steps) or step % every == 0:
            left = (time.monotonic() - clock) / (step - start) * (steps - step)
            width = len(str(steps))
            say(f"{what} {step:{width}}/{steps}  {summary(numbers)}  {duration(left)} left")

    yield tell


@contextlib.contextmanager
def no_display() -> Iterator[Show]:
    """Gives a function that shows nothing, for processes other than the first."""
    yield lambda step, numbers: None


def evaluation_line(step: int, name: str, numbers: Mapping[str, float]) -> str:
    """The line of an evaluation: the name of the held-out set, if it has one, and its numbers."""
    own = {metric.removeprefix(prefix(name)): value for metric, value in numbers.items()}
    return f"{f'eval {name}'.rstrip()}, step {step}: {summary(own)}"


def summary(numbers: Mapping[str, float]) -> str:
    """The numbers in `COLUMNS` and the speed, as text for a line."""
    parts = [f"{word} {numbers[name]:.4f}" for name, word in COLUMNS.items() if name in numbers]
    if "tokens_per_second" in numbers:
        parts.append(f"{numbers['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)


def duration(seconds: float | int) -> str:
    """A time in seconds as `1:02:03`, or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextlib.contextmanager
def _bar(start: int, steps: int) -> Iterator[Show]:
    progress = require("rich.progress", extra="train")
    # These columns fit into the 80 characters of a narrow terminal.
    columns = (
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=8),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("{task.fields[text]}"),
    )
    # Slow enough to cost nothing compared with the steps.
    with progress.Progress(*columns, refresh_per_second=4) as bars:
        task = bars.add_task("train", total=steps, completed=start, text="compiling")
        yield lambda step, numbers: bars.update(task, completed=step, text=summary(numbers))
