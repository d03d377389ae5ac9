"""Every setting of `dpo-eqx train`, put together from the groups in `groups/`.

`parse.py` reads settings from flags and files; `check.py` finds those that contradict each other.
"""

import dataclasses
from typing import ClassVar

from .groups.adapters import AdapterFlags
from .groups.data import DataFlags
from .groups.devices import DeviceFlags
from .groups.loss import LossFlags
from .groups.memory import MemoryFlags
from .groups.models import ModelFlags
from .groups.optimizer import OptimizerFlags
from .groups.run import RunFlags


# The last group comes first in `--help` and in `config.yaml`.
@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(
    DeviceFlags,
    MemoryFlags,
    AdapterFlags,
    OptimizerFlags,
    LossFlags,
    RunFlags,
    DataFlags,
    ModelFlags,
):
    """Trains a policy on preferences, from text files to a checkpoint that `transformers` loads."""

    # The command, for its warnings; not a flag.
    command: ClassVar[str] = "train"


# These belong to one invocation, not to the run, so `config.yaml` does not keep them.
INVOCATION = ("config", "resume", "dry_run", "coordinator", "num_processes", "process_id")
