"""Replaces a folder as a whole, so that a failed write never damages a good checkpoint.

Files that do not belong to a checkpoint stay in the folder.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .folder import CONFIG, INDEX, is_carried


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh folder to write into, which replaces `path` at the end.

    If writing fails, `path` stays as it was. Folders in `path`, and files that do not belong to a
    checkpoint, are kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        # `mkdtemp` lets only the owner in; others may read a checkpoint.
        fresh.chmod(0o755)
        yield fresh
        _swap(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, path: Path) -> None:
    if not path.exists():
        fresh.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    path.rename(old)
    fresh.rename(path)
    for entry in old.iterdir():
        if not _is_checkpoint(entry) and not (path / entry.name).exists():
            entry.rename(path / entry.name)
    shutil.rmtree(old)


def _is_checkpoint(file: Path) -> bool:
    if file.name in (CONFIG, INDEX) or is_carried(file.name):
        return True
    return file.is_file() and file.suffix == ".safetensors"
