"""Rows on disk, mapped into memory: token ids in one flat file, and an index of offsets.

A cache is a folder named by its key. It is complete or absent: it is written under another name
and then renamed.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from .._fingerprint import digest
from .report import Report
from .rows import Row, completions_of, mask_name, numbers_of, scored_of

# Change it if the layout of the files changes, or if the same input gives other ids.
_VERSION = 5


def default_folder() -> Path:
    """The folder of caches: `$DPO_EQX_CACHE`, else `dpo_eqx` in the user's cache folder."""
    if folder := os.environ.get("DPO_EQX_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_eqx"


class TokenCache:
    """Rows on disk, read on access: `len(rows)`, `rows[i]`, `rows.lengths()`.

    **Arguments:**

    - `folder`: the folder of one cache, as in `report.cache`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._meta = json.loads((folder / "meta.json").read_text())
        parts = 1 + len(self._meta["completions"])
        self._ids = _mapped(folder / "ids.bin", np.int32, (-1,))
        self._ends = _mapped(folder / "ends.bin", np.int64, (-1, parts))
        self._numbers = _mapped(folder / "numbers.bin", np.float64, (len(self._ends), -1))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"`index` must be below the number of rows, {len(self)}; got {index}.")
        index %= len(self)
        ends = self._ends[index]
        starts = [self._ends[index - 1][-1] if index else 0, *ends[:-1]]
        names = ["prompt_ids", *self._meta["completions"]]
        spans = zip(names, starts, ends, strict=True)
        row: Row = {}
        for name, start, end in spans:
            row |= _decoded(name, self._ids[start:end])
        row |= zip(self._meta["numbers"], self._numbers[index].tolist(), strict=True)
        if "label" in row:
            row["label"] = bool(row["label"])
        return row if row["prompt_ids"] else row | {"start_id": self._meta["start_id"]}

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def lengths(self) -> Int[np.ndarray, "rows parts"]:
        """The tokens of each row's prompt and of each of its completions."""
        starts = np.concatenate([[0], self._ends[:-1, -1]]).astype(np.int64)
        return np.diff(np.column_stack([starts, self._ends]), axis=1).astype(np.int32)

    def digest_ids(self) -> str:
        """The digest of the ids of all rows."""
        return self._meta["ids"]

    @property
    def report(self) -> Report:
        """The report of the `tokenize` call that made this cache."""
        return Report(**self._meta["report"], cache=self.folder)


def _decoded(name: str, stored: Int[np.ndarray, " tokens"]) -> Row:
    """The ids of a part of a row, and which of them are scored if some are not."""
    scored = stored >= 0
    if scored.all():
        return {name: stored.tolist()}
    return {name: np.where(scored, stored, ~stored).tolist(), mask_name(name): scored.tolist()}


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros([max(size, 0) for size in shape], dtype)
    return np.memmap(path, dtype, mode="r").reshape(shape)


def open_cache(folder: str | Path | None, key: str) -> tuple[TokenCache, Report] | None:
    """The rows under `key` and their report, or `None` if this cache does not exist."""
    path = Path(folder or default_folder()) / f"tokens-{_VERSION}-{key}"
    if not (path / "meta.json").exists():
        return None
    rows = TokenCache(path)
    return rows, rows.report


def write_cache(
    folder: str | Path | None, key: str | None, rows: Iterable[Row], report: Report
) -> tuple[TokenCache, Report]:
    """Writes `rows` one by one, and then `report`, which is complete after the last row.

    **Arguments:**

    - `folder`: the folder of the caches; `None` is `default_folder()`.
    - `key`: the key of this cache; `None` takes the digest of the written rows.

    **Returns:**

    The rows on disk, and the report with their folder.
    """
    with aside(Path(folder or default_folder())) as temporary:
        meta = _write_rows(temporary, rows)
        meta["report"] = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
        del meta["report"]["cache"]
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        name = f"tokens-{_VERSION}-{key or meta['content']}"
        return (cache := TokenCache(settle(temporary, name))), cache.report


def _write_rows(folder: Path, rows: Iterable[Row]) -> dict[str, Any]:
    content, ids_only = (hashlib.blake2b(digest_size=16) for _ in range(2))
    end, start_id = 0, None
    completions, numbers = ["chosen_ids", "rejected_ids"], []
    with (
        (folder / "ids.bin").open("wb") as ids_file,
        (folder / "ends.bin").open("wb") as ends_file,
        (folder / "numbers.bin").open("wb") as numbers_file,
    ):
        for row in rows:
            completions, numbers = completions_of(row), numbers_of(row)
            ids, sizes, values = _parts(row)
            ends = end + np.cumsum(sizes)
            end = int(ends[-1])
            start_id = row.get("start_id", start_id)
            ids_file.write(ids.tobytes())
            ends_file.write(ends.astype(np.int64).tobytes())
            numbers_file.write(values.tobytes())
            _add_ids(ids_only, row)
            content.update(values.tobytes())
    return {
        "content": digest(ids_only.hexdigest(), content.hexdigest(), completions, numbers),
        "ids": ids_only.hexdigest(),
        "completions": completions,
        "numbers": numbers,
        "start_id": start_id,
    }


def _parts(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All ids of a row concatenated, the sizes of its parts, and its numbers.

    A token `i` that is not scored is `~i`, which is negative.
    """
    parts = [row["prompt_ids"], *(row[name] for name in completions_of(row))]
    ids = np.array([i for part in parts for i in part], np.int32)
    if any(mask_name(name) in row for name in completions_of(row)):
        masks = [np.ones(len(parts[0]), bool), *(scored_of(row, n) for n in completions_of(row))]
        ids = np.where(np.concatenate(masks), ids, ~ids)
    sizes = np.array([len(part) for part in parts], np.int64)
    return ids, sizes, np.array([float(row[name]) for name in numbers_of(row)], np.float64)


def digest_ids(rows: Iterable[Row]) -> str:
    """A digest of the ids of all rows, without numbers; the same in memory and on disk."""
    if isinstance(rows, TokenCache):
        return rows.digest_ids()
    content = hashlib.blake2b(digest_size=16)
    for row in rows:
        _add_ids(content, row)
    return content.hexdigest()


def _add_ids(content: Any, row: Row) -> None:
    content.update(f"{completions_of(row)} {row.get('start_id')};".encode())
    ids, sizes, _ = _parts(row)
    content.update(sizes.tobytes() + ids.tobytes())


@contextlib.contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`, which is removed at the end unless it was renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settle(temporary: Path, name: str) -> Path:
    """Renames a finished folder to its name, unless another process was faster."""
    final = temporary.parent / name
    try:
        temporary.rename(final)
    except OSError:
        if not final.exists():
            raise
    return final
