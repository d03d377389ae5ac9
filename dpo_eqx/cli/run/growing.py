"""A JSON Lines file that grows line by line, and that a later process continues where it ended.

Beside it lies a small file that says what it was begun with. What the lines hold is up to others.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .folder import replace_text

Write = Callable[[Mapping[str, Any]], None]


def beside(path: Path, kind: str) -> Path:
    """The file of this kind beside `path`: for `a.jsonl` and `run.json` it is `a.run.json`."""
    return path.with_name(f"{path.stem}.{kind}")


def begin(path: Path, facts: Mapping[str, Any], *, resume: bool, outputs: tuple[Path, ...]) -> None:
    """Notes what the lines are made with, or checks it against the note of an earlier process.

    **Arguments:**

    - `path`: the file that `--output` names; the note is `beside(path, "run.json")`.
    - `facts`: what decides the lines: settings, and digests of all inputs.
    - `resume`: whether lines of an earlier process may be continued.
    - `outputs`: all files that the command writes to, besides the note.

    **Raises:**

    `ValueError` if there are lines already, and `resume` is false, or they were made with other
    facts.
    """
    note = beside(path, "run.json")
    there = [file for file in outputs if file.exists() and file.stat().st_size]
    if there and not note.exists():
        raise ValueError(
            f"`--output` must be a new file, or one that this command has begun; {there[0]} exists "
            f"and has no {note.name} beside it. Give another path, or remove the file."
        )
    if there and not resume:
        raise ValueError(
            f"`--output` must be a new file; {there[0]} exists. Continue it by leaving out "
            "`--no-resume`, or give another path."
        )
    facts = json.loads(json.dumps(facts))  # as they are read back: lists for tuples
    if there:
        _check_same(json.loads(note.read_text(encoding="utf-8")), facts, path)
    replace_text(note, json.dumps(facts, indent=1) + "\n")


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    names = {**before, **now}
    changed = [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"`--output` must be a new file, or one that was begun with the same settings and "
            f"inputs; for {path}, {'; '.join(changed)}. Give the same, or another path."
        )


def complete_lines(path: Path) -> int:
    """The number of lines in the file. A last line that is only half written is cut off."""
    if not path.exists():
        return 0
    lines = size = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            lines, size = lines + 1, size + len(line)
    if size < path.stat().st_size:
        with path.open("rb+") as file:
            file.truncate(size)
    return lines


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Write]:
    """A function that appends a line. The system has the line before the function returns."""
    with path.open("a", encoding="utf-8") as file:

        def write(line: Mapping[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        yield write


def read_objects(path: Path, flag: str) -> list[dict[str, Any]]:
    """The objects in the lines of a file that `flag` names.

    **Raises:**

    `ValueError` or `FileNotFoundError` that names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`{flag}` must be a JSON Lines file; there is no file {path}.")
    objects = []
    # By bytes: lines end at line feeds alone.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"`{flag}` must hold JSON in each line; line {number} of {path} does not: {error}."
            ) from None
        if not isinstance(value, dict):
            raise ValueError(
                f"`{flag}` must hold an object in each line; line {number} of {path} is "
                f"{line[:40]!r}."
            )
        objects.append(value)
    return objects
