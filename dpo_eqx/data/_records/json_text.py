"""Records in JSON: an object on each line, or one list of objects.

Errors name the line and the column in it, both counted from 1.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .compression import BOM, BROKEN, broken, open_file, text_of
from .values import found

_SPACE = re.compile(r"[ \t\r\n]*")


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on each line that is not blank."""
    number = 0
    try:
        # Binary, so that lines end only at "\n" and not at the line separators of Unicode.
        with io.BufferedReader(open_file(path)) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"line {number} of {path}"
                    yield where, _parse_line(line.removeprefix(BOM).rstrip(b"\r\n"), where)
    except BROKEN as error:
        raise broken(path, f"line {number}", error) from error


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    text = text_of(line, where)
    try:
        record = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}, column {error.pos + 1}: {error.msg}; found {_near(error)}. Each line must "
            "hold one JSON object, or the file one list of them. The name of a table ends with "
            "`.csv` or `.tsv`."
        ) from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(error, f"{where}, column 1") from None
    return _checked(record, f"{where}, column 1")


def array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of the list that the file holds. Its text is read into memory."""
    try:
        with open_file(path) as file:
            content = file.read().removeprefix(BOM)
    except BROKEN as error:
        raise broken(path, "line 0", error) from error
    text, number = _text_of_lines(content, path), 1
    start = _after_space(text, text.index("[") + 1)
    end, line, counted = start, 1, 0
    # Behind a comma an object must follow, so `]` ends the loop only in front of the first one.
    while text[end : end + 1] != "]":
        line, counted = line + text.count("\n", counted, start), start
        where = f"item {number} (line {line}) of {path}"
        record, end = _item(text, start, path, where)
        yield where, _checked(record, where)
        start, number = _after_space(text, end + 1), number + 1
    if rest := text[end + 1 :].strip():
        raise ValueError(f"{path} must end after its list; found {found(rest)} behind it.")


def _item(text: str, start: int, path: Path, where: str) -> tuple[Any, int]:
    """The value at `start`, and the place of the comma or bracket behind it."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        end = _after_space(text, end)
        if text[end : end + 1] not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, end)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} of {path}, column {error.colno}"
        raise ValueError(f"{place}: {error.msg}; found {_near(error)}.") from None
    except (ValueError, RecursionError) as error:
        raise _unreadable(error, where) from None
    return value, end


def _text_of_lines(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        start = content.rfind(b"\n", 0, error.start) + 1
        number = content.count(b"\n", 0, error.start) + 1
        end = content.find(b"\n", start)
        line = content[start : end if end > 0 else None]
        return text_of(line, f"line {number} of {path}")


def _after_space(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    return space.end() if space else start


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"The name `{twice}` is given twice.")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _near(error: json.JSONDecodeError) -> str:
    near = error.doc[error.pos : error.pos + 20]
    return repr(near) if near else "the end of the line"


def _unreadable(error: Exception, where: str) -> ValueError:
    reason = str(error).removesuffix(".")
    return ValueError(f"{where}: cannot be read as JSON: {reason}.")


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: must be a JSON object with columns by name; found {found(record)}."
        )
    return record
