"""A worker's side of taking turns: it runs and times steps when the parent asks for them.

It needs the standard library alone, since it runs in every system's own environment. `workers.py`
is the parent's side.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Steps before the first turn: the first one compiles, and the losses of all are compared.
WARM_UP = 3


class Turns:
    """A loop reports each of its steps to this object, and waits in it for its turn.

    A callback is enough, so it also suits the loops of other libraries:

    ```python
    turns = Turns()
    while turns.step_done(loss=float(step())):
        pass
    ```

    Only answers to the parent go to standard output; text that a library prints there goes to
    standard error.

    **Arguments:**

    - `device_peak`: returns the peak memory of the accelerator so far, in GB.
    - `about`: further facts for the parent.
    """

    def __init__(self, *, device_peak: Callable[[], float] = lambda: 0.0, **about: Any):
        self._device_peak = device_peak
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._times: list[float] = []
        self._losses: list[float] = []
        self._left = WARM_UP
        self._about = about
        self._started = time.perf_counter()

    def begin(self) -> None:
        """Starts the clock of the first step, after loading."""
        self._about["loaded"] = resident("VmRSS")
        self._started = time.perf_counter()

    def step_done(self, loss: float) -> bool:
        """Records a step that has just ended, and waits if the turn is over.

        **Arguments:**

        - `loss`: the step's loss; as a Python number it exists only when the step is done.

        **Returns:**

        Whether to continue.
        """
        now = time.perf_counter()
        self._times.append(now - self._started)
        self._losses.append(float(loss))
        self._left -= 1
        if self._left == 0:
            self._report()
            asked = sys.stdin.readline()
            if not asked.strip():
                self._answers.close()
                return False
            self._left = int(asked)
        self._started = time.perf_counter()
        return True

    def _report(self) -> None:
        about = {**self._about, "peak": resident("VmHWM"), "device_peak": self._device_peak()}
        answer = {"times": self._times, "losses": self._losses, **about}
        print(json.dumps(answer), file=self._answers, flush=True)
        self._times, self._losses = [], []


def resident(which: str) -> float:
    """The resident memory of this process in GB, now (`VmRSS`) or at its peak (`VmHWM`).

    Linux keeps `ru_maxrss` across `exec`, so a child begins with its parent's peak. It is used only
    if nothing else is available.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(which + ":"))
    return int(line.split()[1]) * 1024 / 1e9
