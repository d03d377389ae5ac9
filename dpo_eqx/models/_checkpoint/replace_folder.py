"""A folder replaced as a whole: never half of it over a good one.

It knows which files a checkpoint consists of only to leave all others where they are.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .folder import CONFIG, INDEX, is_carried


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A fresh folder to write into, which takes the place of `path` at the end.

    Where writing fails, `path` is as it was. Files in `path` that no checkpoint has, and folders,
    are kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        # Folders for temporary files are for their owner alone; a checkpoint is not.
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
    for kept in old.iterdir():
        if not _is_checkpoint(kept) and not (path / kept.name).exists():
            kept.rename(path / kept.name)
    shutil.rmtree(old)


def _is_checkpoint(file: Path) -> bool:
    if file.name in (CONFIG, INDEX) or is_carried(file.name):
        return True
    return file.is_file() and file.suffix == ".safetensors"
