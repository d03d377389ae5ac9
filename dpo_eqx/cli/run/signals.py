"""SIGTERM and Ctrl-C as a request to stop, which a loop checks between two steps.

The second signal ends the process as it would have done without this module.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stop:
    """`stop.signal` is the name of the signal that requested the stop, `None` until then."""

    signal: str | None = None

    def before(self, step: int) -> bool:
        """Whether to stop before this step."""
        return self.signal is not None


@contextlib.contextmanager
def catch_signals() -> Iterator[Stop]:
    """A `Stop` that SIGTERM or SIGINT sets, while the context lasts."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can set handlers
        return
    handlers: dict[int, object] = {}

    def ask(number: int, frame: object):
        stop.signal = signal.Signals(number).name
        signal.signal(number, handlers[number])  # pyright: ignore[reportArgumentType]: `signal` returned it

    for number in (signal.SIGTERM, signal.SIGINT):
        handlers[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]: as above
