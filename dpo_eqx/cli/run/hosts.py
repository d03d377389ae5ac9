"""Several processes as one run: they connect, compare what they were given, and end together.

Where arrays lie is in `devices.py`. Of one process alone nothing here asks anything.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..settings.settings import Settings
from ..terminal import display
from .signals import Stop, catch_signals

Result = TypeVar("Result")

# Without a sign of life for so long, in seconds, a process is taken for dead.
HEARTBEAT = 20
# For all to be there at the beginning, and for a connection to be ended, in seconds.
ARRIVAL, FAREWELL = 120, 10
AUTO = "auto"
# Each process may have its own.
_OWN = {"config", "coordinator", "process_id", "cache"}


class CommonError(ValueError):
    """An error that every process raises, so that none waits for another."""


@contextlib.contextmanager
def connected(settings: Settings) -> Iterator[None]:
    """The processes of a run connected, where the settings say that there are several.

    A process that fails alone ends at once, without the ceremony in which it would wait for the
    others; they hear of it from the runtime.
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
        _leave(error)
    else:
        wait("the end")


def is_first() -> bool:
    """Whether this is the process that writes and shows; one alone is."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """A line, from the first process."""
    if is_first():
        display.say(text)


def warn(text: str) -> None:
    """A warning on stderr, from the first process."""
    if is_first():
        print(f"dpo-eqx train: warning: {text}", file=sys.stderr, flush=True)


def together(function: Callable[[], Result]) -> Result:
    """What `function` returns, or an error on every process where it raises one on any.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` from `function` as it is where there is one process;
    else `CommonError` with the same words, and with the processes where not all of them raised it.
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
    """Raises where processes have been given other settings, or have found other facts.

    **Raises:**

    `CommonError` on every process, with the values of each.
    """
    if jax.process_count() == 1:
        return
    given = {n: str(value) for n, value in vars(settings).items() if n not in _OWN}
    given |= {name: str(value) for name, value in facts.items()}
    all_given = [json.loads(text) for text in exchange(json.dumps(given))]
    differing = [name for name in given if len({each.get(name) for each in all_given}) > 1]
    if differing:
        lines = [_values(name, [each.get(name) for each in all_given]) for name in differing]
        raise CommonError(
            f"All processes must be given the same; they disagree on {'; '.join(lines)}. Start "
            "all of them with the same settings, versions and data."
        )


def exchange(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([mine.size], np.int32)).ravel()
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def wait(what: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """A `Stop` for all processes: SIGTERM to any of them stops all, after the same step."""
    if jax.process_count() == 1:
        with catch_signals() as stop:
            yield stop
    else:
        yield SharedStop()


class SharedStop(Stop):
    """One that asks the runtime, which has its own handler of SIGTERM."""

    def before(self, step: int) -> bool:
        """Whether to stop before the step; the answer is the same on all processes."""
        if self.signal is None and multihost_utils.reached_preemption_sync_point(step):
            self.signal = "SIGTERM"
        return self.signal is not None


def _connect(settings: Settings, coordinator: str) -> None:
    # The collectives of CPUs; of no effect on others.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = None if coordinator == AUTO else coordinator
    count = settings.num_processes or ""
    print(
        f"All {count} processes train together, and have {ARRIVAL} s to meet at {coordinator}. "
        "Where one of them does not come, or later ends or is lost, the others cannot go on: "
        f"within {HEARTBEAT} s or so the runtime ends them too, with a message of its own about a "
        "fatal error of the distributed service (SIGABRT), or with one about a connection. Nothing "
        "is lost but the steps since the last checkpoint; start all of them again with --resume.",
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
            else f"All {count} must be started, with the address of process 0."
        )
        raise ValueError(
            f"`--coordinator {coordinator}` could not bring the processes together: "
            f"{str(error).splitlines()[0]} {remedy}"
        ) from error


def _leave(error: BaseException) -> None:
    if os.environ.get("DPO_EQX_TRACEBACK"):
        traceback.print_exception(error)
    if isinstance(error, jax.errors.JaxRuntimeError):
        print(
            "dpo-eqx train: what was computed together failed, most likely because another process "
            f"was lost: {str(error).splitlines()[0]} Start all of them again with --resume.",
            file=sys.stderr,
        )
    elif isinstance(error, ValueError | OSError | ImportError):
        print(f"dpo-eqx train: {error}", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not `sys.exit`: on the way out the runtime would wait for the others, and they for this one.
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 2)


def _joined(problems: list[str]) -> str:
    if len(set(problems)) == 1:
        return problems[0]
    return "; ".join(f"process {i}: {words}" for i, words in enumerate(problems) if words)


def _values(name: str, values: list[str | None]) -> str:
    words = ", ".join(f"{value} on process {i}" for i, value in enumerate(values))
    return f"`{name}`: {words}"
