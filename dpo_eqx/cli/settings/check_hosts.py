"""Checks of the settings that connect processes, before anything else."""

import re
from collections.abc import Iterator

from .check import flag, raise_all
from .settings import Settings


def check_hosts(settings: Settings) -> None:
    """Raises `ValueError` if the settings do not let a process find the other processes."""
    raise_all(_hosts(settings))


def _hosts(settings: Settings) -> Iterator[str]:
    """An error message for each fault in the settings that connect processes."""
    s = settings
    numbers = {"num_processes": s.num_processes, "process_id": s.process_id}
    given_flags = [flag(name) for name, value in numbers.items() if value is not None]
    if s.coordinator is None or s.coordinator == "auto":
        if given_flags:
            yield (
                f"{given_flags[0]} needs `--coordinator HOST:PORT`; give the address of process 0 "
                f"there, or leave out {given_flags[0]}."
            )
        return
    if not re.fullmatch(r".+:\d+", s.coordinator):
        yield f"`--coordinator` must be HOST:PORT of process 0, or `auto`; got {s.coordinator!r}."
    if s.num_processes is None or s.process_id is None:
        yield "`--coordinator HOST:PORT` needs `--num-processes` and `--process-id`; give both."
    elif not 0 <= s.process_id < s.num_processes:
        yield (
            "`--process-id` must be at least 0 and below `--num-processes`; got "
            f"{s.process_id} and {s.num_processes}."
        )
