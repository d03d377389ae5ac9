"""SIGTERM and Ctrl-C as a wish to stop, which a loop looks at between two steps.

The second signal ends the process as it would have without this.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stop:
    """`stop.signal` is the name of the signal that asked to stop, `None` before."""

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
    before: dict[int, object] = {}

    def ask(number, frame):
        stop.signal = signal.Signals(number).name
        signal.signal(number, before[number])  # pyright: ignore[reportArgumentType]: what `signal` gave

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]: as above
