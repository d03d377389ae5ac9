"""Several independent processes that write one file: each writes a part, the last one joins them.

They do not communicate. So they may run at once or one after another, and each is continued alone.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from .growing import beside


def share_of(count: int, index: int, parts: int) -> range:
    """The numbers, out of `count`, that belong to part `index` of `parts`."""
    return range(count * index // parts, count * (index + 1) // parts)


def check_number(index: int, parts: int) -> None:
    """Raises `ValueError` if `--process-id` is not below `--num-processes`, or negative."""
    if not 0 <= index < parts:
        raise ValueError(
            "`--process-id` must be at least 0 and below `--num-processes`; got "
            f"{index} and {parts}."
        )


def part_paths(path: Path, parts: int) -> list[Path]:
    """The file of each part; a single part is the whole file."""
    if parts == 1:
        return [path]
    return [beside(path, f"part-{i}-of-{parts}{path.suffix}") for i in range(parts)]


def join(path: Path, paths: Sequence[Path], sizes: Sequence[int]) -> bool:
    """Whether the whole file is there, after joining the parts if all of them are complete.

    Two processes that end at the same time may both join. Both write the same file, and each
    replaces it as a whole.

    **Arguments:**

    - `path`: the whole file.
    - `paths`: the files of the parts, in their order; the whole file itself if it has one part.
    - `sizes`: the number of lines of each complete part.
    """
    if list(paths) == [path]:
        return True
    if path.exists():
        _remove(paths)  # the process that joined them may have been killed before it did
        return True
    joined = beside(path, f"joining-{os.getpid()}")
    try:
        if [_lines(part) for part in paths] != list(sizes):
            return False
        with joined.open("wb") as whole:
            for part in paths:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
    except FileNotFoundError:
        # A part is not begun, or another process has joined the parts meanwhile.
        joined.unlink(missing_ok=True)
        return path.exists()
    os.replace(joined, path)
    _remove(paths)
    return True


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _lines(path: Path) -> int:
    """The complete lines of a file that another process may be writing; nothing is cut off."""
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)
