"""A run whose disk is full at step 4, in a process of its own: Orbax leaves open what it began."""

import resource
import sys
from pathlib import Path

from dpo_eqx.cli.run import checkpoints

from .small import small

SAVE = checkpoints.Checkpoints.save


def save_with_no_room(self, step, state, position, **options):
    """Saves, step 4 where a file cannot grow past 1000 bytes."""
    if step != 4:
        return SAVE(self, step, state, position, **options)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        return SAVE(self, step, state, position, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


if __name__ == "__main__":
    checkpoints.Checkpoints.save = save_with_no_room
    folder = Path(sys.argv[1])
    raise SystemExit(small(folder, eval_data=folder / "eval.jsonl"))
