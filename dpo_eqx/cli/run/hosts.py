"""Several processes as one run: they connect, compare their settings, and end together.

`devices.py` places arrays. With a single process these functions communicate nothing.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..settings.settings import Settings
from ..terminal import display
from .signals import Stop, catch_signals

Result = TypeVar("Result")

# A process that sends no heartbeat for this many seconds counts as dead.
HEARTBEAT = 20
# Time for all processes to connect at the start, and to disconnect at the end, in seconds.
ARRIVAL, FAREWELL = 120, 10
AUTO = "auto"
# These settings may differ between processes.
_OWN = {"config", "coordinator", "process_id", "cache"}


class CommonError(ValueError):
    """An error that every process raises, so that none waits for another."""


@contextlib.contextmanager
def connected(settings: Settings) -> Iterator[None]:
    """Connects the processes of a run, if the settings say that there are several.

    A process that fails alone ends at once. A regular end would wait for all processes, which may
    themselves wait for this one; the runtime notifies them of the loss instead.
    """
    if settings.coordinator is None:
        yield
        return
    _connect(settings, settings.coordinator)
    try:
        yield
    except CommonError:
        raise
    except BaseException as error:
        _leave(settings.command, error)
    else:
        wait("the end")


def is_first() -> bool:
    """Whether this is the process that writes and prints. A single process is the first."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints a line, on the first process only."""
    if is_first():
        display.say(text)


def warn(command: str, text: str) -> None:
    """Prints a warning of a command on stderr, on the first process only."""
    if is_first():
        print(f"dpo-eqx {command}: warning: {text}", file=sys.stderr, flush=True)


def on_first(function: Callable[..., object], *args: Any, **options: Any) -> None:
    """Calls `function` on the first process only; an error there is raised on every process.

    **Raises:**

    The errors of `together`.
    """
    together(lambda: function(*args, **options) if is_first() else None)


def together(function: Callable[[], Result]) -> Result:
    """The result of `function`, or an error on every process if it raises one on any of them.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` unchanged from `function` if there is one process.
    Otherwise `CommonError` with the same message; it names the processes that raised it unless all
    of them did.
    """
    if jax.process_count() == 1:
        return function()
    result, problem = None, ""
    try:
        result = function()
    except (ValueError, OSError, ImportError) as error:
        problem = str(error) or type(error).__name__
    problems = exchange(problem)
    if any(problems):
        raise CommonError(_joined(problems))
    return result  # pyright: ignore[reportReturnType]: there was no error, so it is what was returned


def compare(settings: Settings, facts: Mapping[str, object]) -> None:
    """Raises an error if processes differ in their settings or in `facts`.

    **Raises:**

    `CommonError` on every process, with the values of each.
    """
    if jax.process_count() == 1:
        return
    local = {n: str(value) for n, value in vars(settings).items() if n not in _OWN}
    local |= {name: str(value) for name, value in facts.items()}
    by_process = [json.loads(text) for text in exchange(json.dumps(local))]
    differing = [name for name in local if len({values.get(name) for values in by_process}) > 1]
    if differing:
        lines = [_values(name, [values.get(name) for values in by_process]) for name in differing]
        raise CommonError(
            "All processes must have the same settings, versions and data; they disagree on "
            f"{'; '.join(lines)}. Give the same to all of them, and start all again."
        )


def exchange(text: str) -> list[str]:
    """The texts of all processes, in the order of their numbers."""
    content = np.frombuffer(text.encode(), np.uint8)
    # An all-gather needs one shape on all processes, so texts are padded to the longest.
    sizes = multihost_utils.process_allgather(np.array([content.size], np.int32)).ravel()
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: content.size] = content
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def summed(x: np.ndarray) -> np.ndarray:
    """The sum of the arrays of all processes, which have one shape."""
    if jax.process_count() == 1:
        return x
    return np.asarray(multihost_utils.process_allgather(x)).sum(axis=0)


def wait(what: str) -> None:
    """Waits until all processes have called this function; `what` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """A `Stop` for all processes: SIGTERM to one process stops all of them after the same step."""
    if jax.process_count() == 1:
        with catch_signals() as stop:
            yield stop
    else:
        yield SharedStop()


class SharedStop(Stop):
    """A `Stop` that asks the runtime, which has its own handler of SIGTERM."""

    def before(self, step: int) -> bool:
        """Whether to stop before the step; the answer is the same on all processes."""
        if self.signal is None and multihost_utils.reached_preemption_sync_point(step):
            self.signal = "SIGTERM"
        return self.signal is not None


def _connect(settings: Settings, coordinator: str) -> None:
    # Collectives between CPUs need an implementation. On GPUs and TPUs the option has no effect.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = None if coordinator == AUTO else coordinator
    count = settings.num_processes
    everyone = "all processes" if count is None else f"all {count} processes"
    print(
        f"{everyone.capitalize()} train together, and have {ARRIVAL} s to connect to "
        f"{coordinator}. If a process does not connect, ends early or is lost, the others cannot "
        f"continue: within about {HEARTBEAT} s the runtime ends them too. It then prints a message "
        "about a fatal error of the distributed service (SIGABRT), or about a connection. Only the "
        "steps since the last checkpoint are lost; start all processes again with --resume.",
        file=sys.stderr,
        flush=True,
    )
    try:
        jax.distributed.initialize(
            address,
            settings.num_processes,
            settings.process_id,
            initialization_timeout=ARRIVAL,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=FAREWELL,
        )
    except (RuntimeError, ValueError) as error:
        remedy = (
            "Give the address of process 0 in place of `auto`, with `--num-processes` and "
            "`--process-id`."
            if coordinator == AUTO
            else f"Start {everyone}, and give the address of process 0."
        )
        raise ValueError(
            f"`--coordinator {coordinator}` could not connect the processes: "
            f"{str(error).splitlines()[0]} {remedy}"
        ) from error
    if jax.default_backend() == "cpu":
        # XLA may run the collectives of a CPU program from a cache in another order on each
        # process. Gloo then ends them: 18 of 24 runs of `online` on two processes.
        jax.config.update("jax_enable_compilation_cache", False)


def _leave(command: str, error: BaseException) -> None:
    if os.environ.get("DPO_EQX_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError):
        print(
            f"dpo-eqx {command}: A computation across processes failed, most likely because "
            f"another process was lost: {str(error).splitlines()[0]} Start all processes again "
            "with --resume.",
            file=sys.stderr,
        )
    elif isinstance(error, ValueError | OSError | ImportError):
        print(f"dpo-eqx {command}: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: the runtime would wait for the other processes, and they for this process.
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)


def _joined(problems: list[str]) -> str:
    if len(set(problems)) == 1:
        return problems[0]
    return "; ".join(f"process {i}: {words}" for i, words in enumerate(problems) if words)


def _values(name: str, values: list[str | None]) -> str:
    words = ", ".join(f"{value} on process {i}" for i, value in enumerate(values))
    return f"`{name}`: {words}"
