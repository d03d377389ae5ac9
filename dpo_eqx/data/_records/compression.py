"""The bytes of a file, decompressed, and its text. Nothing here knows about records."""

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from typing import Any

from ..._extras import require

# What the libraries raise for a file that is cut off or damaged.
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError)
BOM = b"\xef\xbb\xbf"


def open_file(path: Path) -> Any:
    """The file, open for reading bytes; its first bytes decide how it is decompressed."""
    with path.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if magic.startswith(b"BZh"):
        return bz2.open(path, "rb")
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path, "rb")
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        # Python itself reads Zstandard only from version 3.14 on.
        pyarrow = require("pyarrow", extra="data")
        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return path.open("rb")


def is_compressed(path: Path) -> bool:
    """Whether `open_file` decompresses the file."""
    with path.open("rb") as plain, open_file(path) as file:
        return plain.read(6) != file.read(6)


def text_of(line: bytes, where: str) -> str:
    """A line as text.

    **Raises:**

    `ValueError` that names the place and the byte that is not UTF-8.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        bad = line[error.start : error.start + 1]
        raise ValueError(f"{where}, column {column}: must be UTF-8; found {bad!r}.") from None


def broken(path: Path, after: str, error: Exception) -> ValueError:
    """The error for a file that ends too early or is damaged."""
    return ValueError(f"{path} is broken after {after}: {error}. Fetch or compress it again.")
