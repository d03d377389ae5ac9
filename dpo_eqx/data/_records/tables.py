"""Records in tables: Parquet, Arrow, and CSV or TSV.

A table gives every record every column. `nulls.py` finds the nulls that this adds.
"""

import ast
import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..._extras import require
from .compression import BOM, BROKEN, broken, is_compressed, open_file, text_of
from .nulls import AddedDefaults
from .turns import is_messages
from .values import found, ticked

_ROWS = 1024
# Longer than any text; the default of 131072 characters is shorter than a conversation.
_LONGEST_CELL = 2**31 - 1


def parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a Parquet file, counted from 1."""
    file_of = require("pyarrow.parquet", extra="data").ParquetFile

    def batches() -> Iterator[Any]:
        with file_of(_seekable(path)) as file:
            yield file.schema_arrow
            yield from file.iter_batches(batch_size=_ROWS)

    return _rows(path, batches())


def arrow(path: Path, *, is_stream: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a file or a stream in Arrow's own format, counted from 1."""
    ipc = require("pyarrow.ipc", extra="data")

    def batches() -> Iterator[Any]:
        source = _seekable(path)
        if is_stream:
            with require("pyarrow", extra="data").input_stream(source) as file:
                stream = ipc.open_stream(file)
                yield stream.schema
                yield from stream
            return
        with ipc.open_file(source) as file:
            yield file.schema
            yield from (file.get_batch(i) for i in range(file.num_record_batches))

    return _rows(path, batches())


def _rows(path: Path, batches: Iterator[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of Arrow's record batches; the schema comes first."""
    number = 0
    try:
        added = AddedDefaults(next(batches))
        for batch in batches:
            # In slices, since a batch of Python objects takes many times its memory.
            for start in range(0, batch.num_rows, _ROWS):
                for record in batch.slice(start, _ROWS).to_pylist():
                    number += 1
                    yield f"row {number} of {path}", added.removed(record)
    except (*BROKEN, require("pyarrow", extra="data").ArrowException) as error:
        raise ValueError(f"{path} cannot be read after row {number}: {error}.") from error


def _seekable(path: Path) -> Any:
    """What Arrow opens: the path, or the decompressed content."""
    if not is_compressed(path):
        return str(path)
    with open_file(path) as file:
        return require("pyarrow", extra="data").BufferReader(file.read())


def separated(path: Path, delimiter: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a table of text, whose first row holds the names of the columns.

    All cells are text, so that an answer such as `42` or `NA` stays what it is. A cell with
    messages, as JSON or as Python writes them, becomes messages.

    **Arguments:**

    - `delimiter`: the character between cells; `None` takes the one that the first row has.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    line = 0
    try:
        with io.BufferedReader(open_file(path)) as file:
            texts = _text_lines(file, path)
            first = next(texts)
            delimiter = delimiter or _delimiter(first)
            rows = csv.reader(itertools.chain([first], texts), delimiter=delimiter, strict=True)
            names = next(rows)
            _check_names(names, path)
            line = rows.line_num
            for row in rows:
                where = f"line {line + 1} of {path}"
                line = rows.line_num
                if row:
                    yield where, _record(names, row, where)
    except csv.Error as error:
        where = f"line {line + 1} of {path}"
        raise ValueError(
            f"{where}: cannot be read as a table: {error}. A cell that holds "
            'the delimiter, a line end or a quote must be in quotes, with `""` for a quote.'
        ) from None
    except BROKEN as error:
        raise broken(path, f"line {line}", error) from error


def _text_lines(file: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(BOM) if number == 1 else line
        yield text_of(line, f"line {number} of {path}")


def _delimiter(header: str) -> str:
    # Spreadsheets write semicolons in many languages.
    return max(",;\t", key=header.count)


def _check_names(names: list[str], path: Path) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path} must name each column once; `{twice[0]}` is twice in line 1.")


def _record(names: list[str], row: list[str], where: str) -> dict[str, Any]:
    if len(row) != len(names):
        raise ValueError(
            f"{where}: must have {len(names)} cells, for the columns {ticked(names)}; found "
            f"{len(row)}. A cell that holds the delimiter or a line end must be in quotes."
        )
    cells = zip(names, row, strict=True)
    return {name: _cell(cell, f"`{name}` in {where}") for name, cell in cells}


def _cell(cell: str, what: str) -> Any:
    if not cell.startswith(("[{", "{")) or not cell.endswith(("}]", "}")):
        return cell
    for parse in (json.loads, ast.literal_eval):  # pandas writes messages as Python does
        try:
            value = parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return value if is_messages(value) or is_messages([value]) else cell
    if cell.lstrip("[{").startswith(("'role'", "'content'", "'from'", "'value'")):
        raise ValueError(
            f"{what} must be messages as JSON; found {found(cell)}. Write the column with "
            "`json.dumps`, or save the records as JSON Lines."
        )
    return cell
