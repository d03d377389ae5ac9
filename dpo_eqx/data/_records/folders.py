"""Which files of a folder are read: the conventions of the Hugging Face hub.

`sources.py` reads the files. Folders that `datasets` has saved name their splits themselves.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..._extras import require

SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SUFFIXES += (".feather", ".gz", ".bz2", ".xz", ".zst", ".zstd")
# Files about a data set, without records.
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json")
_METADATA += ("state.json", "README.md")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_SHARD = re.compile(r"(\w+(?:\.\w+)*?)-\d{5}-of-\d{5}\b")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The files of a folder that are read, and those that are not; `str` names both.

    **Arguments:**

    - `folder`: the folder.
    - `split`: the split that the files belong to.
    - `files`: the files to read, sorted.
    - `others`: files beside them that are not read, without hidden files and metadata.
    """

    folder: Path
    split: str
    files: tuple[Path, ...]
    others: tuple[Path, ...]

    def __str__(self):
        others = f"; not read: {self._names(self.others)}" if self.others else ""
        return f"{self.split}: {self._names(self.files)}{others}"

    def _names(self, files: tuple[Path, ...]) -> str:
        names = [file.relative_to(self.folder).as_posix() for file in files[:5]]
        more = [f"and {len(files) - 5} more"] if len(files) > 5 else []
        return ", ".join(names + more)


def choose(folder: Path, split: str | None, subset: str | None = None) -> Chosen:
    """The files of one split: `split`, else `train`, else the only split.

    **Raises:**

    `FileNotFoundError` if the folder has no file of records; `ValueError` if it does not have
    the split or the subset.
    """
    visible = sorted(f for f in folder.rglob("*") if f.is_file() and _is_visible(f, folder))
    readable = [file for file in visible if file.name.endswith(SUFFIXES)]
    if not readable:
        raise FileNotFoundError(
            f"`path_or_iterable` must be a folder that `datasets` has saved or one that holds "
            f"files {', '.join(SUFFIXES)}; `{folder}` is neither."
        )
    splits = _configured(folder, readable, subset) or _by_name(folder, readable)
    name = choose_split(splits, split, str(folder))
    files = tuple(splits[name])
    return Chosen(folder, name, files, tuple(file for file in visible if file not in files))


def choose_split(splits: Collection[str], split: str | None, source: str) -> str:
    """The name of one split: `split`, else `train`, else the only one.

    **Raises:**

    `ValueError` if `source` does not have the split.
    """
    name = split or ("train" if "train" in splits or len(splits) > 1 else next(iter(splits)))
    if name not in splits:
        raise ValueError(f"`split` must be one of {list(splits)} in {source}; got {name!r}.")
    return name


def _is_visible(file: Path, folder: Path) -> bool:
    """Whether a file is neither hidden, as in `.ipynb_checkpoints`, nor metadata."""
    parts = file.relative_to(folder).parts
    return file.name not in _METADATA and not any(p.startswith((".", "__")) for p in parts)


def _by_name(folder: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """The splits that the names of files and folders say; other files train if none says train."""
    splits: dict[str, list[Path]] = {}
    unnamed = []
    for file in files:
        split = _split_of(file.relative_to(folder))
        (unnamed if split is None else splits.setdefault(split, [])).append(file)
    if unnamed and "train" not in splits:
        splits["train"] = unnamed
    return splits


def _split_of(path: Path) -> str | None:
    # The name of the file first: a folder `training_data` may hold a `test.jsonl`.
    shard = _SHARD.match(path.name)
    if shard and path.parent.name == "data":
        return shard[1]
    for part in (path.name, *reversed(path.parent.parts)):
        words = re.split(r"[-._ 0-9]+", part.lower())
        if named := [_SPLIT_OF[word] for word in words if word in _SPLIT_OF]:
            return named[0]
    return None


def _configured(
    folder: Path, readable: list[Path], subset: str | None
) -> dict[str, list[Path]] | None:
    """The splits that `configs:` in `README.md` lists, if there is such a list."""
    configs = _configs(folder / "README.md")
    if not configs:
        if subset is not None:
            raise ValueError(
                f"`subset` must be listed under `configs:` in {folder / 'README.md'}; it lists "
                f"none, and `subset` is {subset!r}."
            )
        return None
    names = [str(config.get("config_name", "default")) for config in configs]
    default = [n for n, c in zip(names, configs, strict=True) if c.get("default") is True]
    wanted = subset or next(iter(default), names[0] if len(names) == 1 else "default")
    if wanted not in names:
        raise ValueError(f"`subset` must be one of {names} in {folder}; got {wanted!r}.")
    config = configs[names.index(wanted)]
    root = folder / str(config.get("data_dir", "."))
    if "data_files" not in config:
        return _by_name(root, [file for file in readable if file.is_relative_to(root)]) or None
    patterns = _patterns(config["data_files"])
    return {s: _matching(root, readable, globs, folder) for s, globs in patterns.items()}


def _configs(readme: Path) -> list[Mapping[str, Any]]:
    if not readme.is_file():
        return []
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme.read_text("utf-8", "replace"), re.DOTALL)
    if head is None or not re.search(r"^configs\s*:", head[1], re.MULTILINE):
        return []
    yaml = require("yaml", extra="data")
    try:
        configs = yaml.safe_load(head[1])["configs"]
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{readme} must begin with YAML between lines `---`: {reason}.") from None
    return [config for config in configs or () if isinstance(config, Mapping)]


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """The patterns of each split, from the forms that the hub understands."""
    if isinstance(data_files, Mapping):
        return {str(split): _as_list(globs) for split, globs in data_files.items()}
    splits: dict[str, list[str]] = {}
    for item in data_files if isinstance(data_files, list) else [data_files]:
        is_split = isinstance(item, Mapping)
        split, globs = (
            (item.get("split", "train"), item.get("path")) if is_split else ("train", item)
        )
        splits.setdefault(str(split), []).extend(_as_list(globs))
    return splits


def _as_list(globs: Any) -> list[str]:
    return [str(glob) for glob in (globs if isinstance(globs, list) else [globs])]


def _matching(root: Path, readable: list[Path], globs: list[str], folder: Path) -> list[Path]:
    found = {file for glob in globs if ".." not in glob for file in root.glob(glob.lstrip("/"))}
    files = [file for file in readable if file in found]
    if not files:
        raise ValueError(
            f"{folder / 'README.md'} lists the files {globs}, and {folder} has none of them that "
            f"ends with {', '.join(SUFFIXES)}. Fetch them, or name a file."
        )
    return files
