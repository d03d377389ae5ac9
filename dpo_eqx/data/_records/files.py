"""One file to records: the content decides format and compression, and the name only a table's.

`json_text.py` and `tables.py` read the formats; `folders.py` decides which files are read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .compression import BOM, BROKEN, broken, open_file
from .json_text import array, lines
from .tables import arrow, parquet, separated

Located = tuple[str, Mapping[str, Any]]

_TABLES = (".csv", ".tsv")
# A byte-order mark, or the zero byte beside a character.
_UTF16 = (b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0[")
# What people take for a file of records, by its first bytes.
_OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or an Excel workbook. Unpack it, or save it as CSV in UTF-8",
    b"version https://git-lfs": "a pointer of Git LFS, without the data. Run `git lfs pull`",
    b"<!DOCTYPE": "a web page. Fetch the file itself",
    b"<html": "a web page. Fetch the file itself",
    b"SQLite format 3": "a database. Export its table as CSV or JSON Lines",
}


def records_of_file(path: Path) -> Iterator[Located]:
    """The records of a file, each with its place.

    **Raises:**

    `ValueError` if the file is broken, is not UTF-8, or has another kind of content.
    """
    try:
        with open_file(path) as file:
            head = file.read(4096)
    except BROKEN as error:
        raise broken(path, "line 0", error) from error
    _check_kind(path, head)
    if head.startswith(b"PAR1"):
        return parquet(path)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return arrow(path, is_stream=head.startswith(b"\xff"))
    first = head.removeprefix(BOM).lstrip()[:1]
    if first == b"[":
        return array(path)
    # A table may begin with any other character, so its name must say that it is one.
    suffix = next((s.lower() for s in path.suffixes if s.lower() in _TABLES), None)
    if first in (b"{", b"") or suffix is None:
        return lines(path)
    return separated(path, delimiter="\t" if suffix == ".tsv" else None)


def _check_kind(path: Path, head: bytes) -> None:
    if head.startswith(_UTF16) and not head.startswith(b"\xff\xff"):
        raise ValueError(
            f"{path} must be UTF-8, and it is UTF-16. Convert it: "
            f"`iconv -f UTF-16 -t UTF-8 {path.name} > utf8-{path.name}`."
        )
    for magic, words in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} must hold records, and it is {words}.")
