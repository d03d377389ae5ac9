"""The parent's side of taking turns: one fresh process for each system, asked in turns.

While one process works, all others wait for a line on their standard input. So each is measured
alone, and all are measured under the same conditions. `peers/` holds the systems' programs.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .problem import Problem

Given = TypeVar("Given")
ROOT = Path(__file__).parent.parent


@dataclasses.dataclass
class Worker:
    """A system in a process of its own, and its measurements.

    `times` are the seconds of each step after the warm-up, `losses` the losses of the warm-up, and
    `first` the seconds of the first step, which compiles. `peak`, `device_peak` and `loaded` are
    the memory in GB.
    """

    name: str
    process: subprocess.Popen[str]
    log: Path
    times: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    first: float = 0.0
    peak: float = 0.0
    device_peak: float = 0.0
    loaded: float = 0.0
    version: str = ""

    def warm_up(self) -> None:
        """Waits for the warm-up steps, which are not timed."""
        answer = self._answer()
        self.losses, self.first = answer["losses"], answer["times"][0]
        self.loaded, self.version = answer.get("loaded", 0.0), answer.get("version", "")

    def turn(self, steps: int) -> None:
        """Lets the worker take some steps, and waits for them."""
        assert self.process.stdin is not None
        print(steps, file=self.process.stdin, flush=True)
        self.times += self._answer()["times"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name} ended without an answer:\n{_end_of(self.log)}")
        answer = json.loads(line)
        self.peak, self.device_peak = answer["peak"], answer["device_peak"]
        return answer

    @property
    def median(self) -> float:
        """The median step, in seconds."""
        return statistics.median(self.times)


class WorkerError(RuntimeError):
    """A system did not run; the message ends with the system's output."""


@contextlib.contextmanager
def started(
    name: str,
    module: str,
    problem: Any,
    folder: Path,
    *,
    python: str | None = None,
    before: Path | None = None,
) -> Iterator[Worker]:
    """A worker for as long as the context lasts.

    **Arguments:**

    - `name`: the system's name, for the table.
    - `module`: the module to run, as `python -m module problem folder`.
    - `problem`: the module's problem, a dataclass such as `Problem`.
    - `folder`: the folder that holds the checkpoints and gets the log.
    - `python`: the interpreter of the system's environment, by default this one.
    - `before`: a folder whose `dpo_eqx` replaces the package of this checkout.
    """
    log = folder / f"{name}.log"
    given = json.dumps(dataclasses.asdict(problem))
    # Without -P the working folder would be first on the path.
    command = [python or sys.executable, "-P", "-m", module, given, str(folder)]
    search = [str(path) for path in (before, ROOT) if path] + [os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, env=environment, stderr=errors, **pipes) as process,
    ):
        try:
            yield Worker(name, process, log)
        finally:
            process.kill()


def alternate(workers: Sequence[Worker], rounds: int, steps: int | Mapping[str, int]) -> None:
    """Runs rounds in which each worker in turn takes some steps."""
    for _ in range(rounds):
        for worker in workers:
            worker.turn(steps if isinstance(steps, int) else steps.get(worker.name, 1))


def given(kind: Callable[..., Given]) -> tuple[Given, Path]:
    """The problem, of type `kind`, and the folder on a worker's command line."""
    problem, folder = sys.argv[1:]
    return kind(**json.loads(problem)), Path(folder)


def given_problem() -> tuple[Problem, Path]:
    """The `Problem` and the folder on a worker's command line, with `policy` and `reference`."""
    return given(Problem)


def _end_of(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text().splitlines()[-lines:])
