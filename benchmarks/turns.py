"""A worker's side of the alternation: steps are run when the parent asks for some, and timed.

Standard library alone: it runs in every system's own environment. The parent's side is in
`workers.py`.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Steps before the first turn: the first compiles, all are compared with the other systems'.
WARM_UP = 3


class Turns:
    """Where a loop reports each of its steps, and where it waits for its turn.

    It suits loops that belong to somebody else, since a callback is enough:

    ```python
    turns = Turns()
    while turns.step_done(loss=float(step())):
        pass
    ```

    Only what the parent asked for goes to the standard output; whatever a library prints there
    goes to the standard error.

    **Arguments:**

    - `device_peak`: gives the highest memory of the accelerator so far, in GB.
    - `about`: what else the parent is told.
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
        """The clock of the first step starts here, after loading."""
        self._about["loaded"] = resident("VmRSS")
        self._started = time.perf_counter()

    def step_done(self, loss: float) -> bool:
        """Records a step that has just ended, and waits where the turn is over.

        **Arguments:**

        - `loss`: of the step; that it is a number ensures that the step is done.

        **Returns:**

        Whether to go on.
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
    """Resident memory of this process in GB, now (`VmRSS`) or at its highest (`VmHWM`).

    Linux keeps `ru_maxrss` across `exec`, so that a child begins with its parent's; it is used
    only where there is nothing else.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(which + ":"))
    return int(line.split()[1]) * 1024 / 1e9
