"""The sources of records: files, folders, the Hugging Face hub, iterables.

Each source yields `(where, record)`; `where` names the record's place in words, for errors.
`files.py` reads a file, and `records.py` checks the content of a record.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..._extras import require
from .files import Located, records_of_file
from .folders import SUFFIXES, choose, choose_split
from .nulls import AddedDefaults
from .values import found

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def open_source(
    source: str | Path, split: str | None, subset: str | None = None
) -> Callable[[], Iterator[Located]]:
    """A function that opens an iterator over the records of a file, a folder or a name of the hub.

    **Raises:**

    `FileNotFoundError` if `source` is none of these.
    """
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, split, subset)
    if path.is_file():
        check_not_given(f"the file {path}", split=split, subset=subset)
        return lambda: records_of_file(path)
    if isinstance(source, str) and _HUB_NAME.fullmatch(source) and path.suffix not in SUFFIXES:
        return lambda: _hub(source, split, subset)
    raise FileNotFoundError(
        f"`path_or_iterable` must be a file, a folder, a name of the Hugging Face hub "
        f"(`owner/name`) or an iterable of mappings; there is no `{source}`."
    )


def files_of(path: Path, split: str | None, subset: str | None = None) -> list[Path]:
    """The data files at `path`: the file itself, or the files of the split, sorted by name."""
    if path.is_file():
        return [path]
    if is_saved(path):
        return sorted({file for pattern in ("*.arrow", "*.json") for file in path.rglob(pattern)})
    return list(choose(path, split, subset).files)


def is_saved(path: Path) -> bool:
    """Whether `datasets` has saved the folder."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def check_not_given(what: str, **choices: str | None) -> None:
    """Raises `ValueError` if `split` or `subset` is given for a source that has only one."""
    for name, value in choices.items():
        if value is not None:
            raise ValueError(
                f"`{name}` is for a folder or a data set with several; got {value!r} for {what}. "
                "Leave it out."
            )


def saved_split(path: Path, split: str | None) -> str | None:
    """The split that is read of a folder that `datasets` has saved; `None` if it has no splits.

    **Raises:**

    `ValueError` if the folder does not have `split`.
    """
    several = path / "dataset_dict.json"
    if several.exists():
        return choose_split(json.loads(several.read_text())["splits"], split, str(path))
    # A part of a split, `train[:10%]`, counts as that split.
    only = (json.loads((path / "state.json").read_text()).get("_split") or "").partition("[")[0]
    if split != only:
        check_not_given(f"{path}, which holds one data set of {only or 'no split'}", split=split)
    return only or None


def _open_folder(
    path: Path, split: str | None, subset: str | None
) -> Callable[[], Iterator[Located]]:
    if is_saved(path):
        check_not_given(f"{path}, which `datasets` has saved", subset=subset)
        name = saved_split(path, split)
        return lambda: _saved(path, name)
    files = choose(path, split, subset).files
    return lambda: (located for file in files for located in records_of_file(file))


def _saved(path: Path, split: str | None) -> Iterator[Located]:
    datasets = require("datasets", extra="data")
    return located(_one_split(datasets.load_from_disk(str(path)), split, str(path)), str(path))


def _hub(name: str, split: str | None, subset: str | None) -> Iterator[Located]:
    datasets = require("datasets", extra="data")
    try:
        dataset = datasets.load_dataset(name, subset, streaming=True)
    except Exception as error:  # `datasets` raises many kinds: missing, private, no network
        raise ValueError(
            f"`path_or_iterable` must be a file or a name of the Hugging Face hub; there is no "
            f"file `{name}`, and it did not load from the hub: {error}"
        ) from error
    return located(_one_split(dataset, split, name), name)


def _one_split(dataset: Any, split: str | None, source: str) -> Iterable[Mapping[str, Any]]:
    is_split = isinstance(dataset, dict)
    return dataset[choose_split(dataset, split, source)] if is_split else dataset


def located(records: Iterable[Any], source: str) -> Iterator[Located]:
    """The records of an iterable, each with its place.

    **Raises:**

    `ValueError` if a record is not a mapping.
    """
    schema = getattr(getattr(records, "features", None), "arrow_schema", None)
    added = AddedDefaults(schema or ())
    for number, record in enumerate(records):
        where = f"record {number} of {source}"
        if not isinstance(record, Mapping):
            raise ValueError(f"{where} must be a mapping of columns by name; got {found(record)}.")
        yield where, added.removed(record)
