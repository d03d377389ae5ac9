"""A checkpoint folder on disk: which files it has, and its tensors, read lazily.

`tensor_names.py` maps tensors to parameters. A pickle is never opened.
"""

import contextlib
import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..._extras import require
from .._decoder.companion_files import Origin
from .config_values import shown
from .tensor_names import Index

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEMPLATES = "additional_chat_templates"
# Patterns of the files that are copied with a policy: the tokenizer in every form that
# `transformers` reads, its chat templates, and the generation settings.
CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    # Fast tokenizers of several versions of `transformers`.
    "tokenizer.[0-9]*.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{TEMPLATES}/*.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    # SentencePiece, tiktoken, and Mistral's own.
    "tokenizer.model",
    "spiece.model",
    "sentencepiece*.model",
    "spm*.model",
    "tiktoken.model",
    "*.tiktoken",
    "tokenizer.model.v*",
    "tekken.json",
)
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def resolve(path: str | os.PathLike[str], files: Sequence[str] = ()) -> Path:
    """A local folder: `path` itself, or the hub repository of that name, downloaded.

    **Arguments:**

    - `path`: a local folder, or a name on the Hugging Face hub.
    - `files`: patterns of the files to download; by default a checkpoint's.

    **Raises:**

    `FileNotFoundError` if there is neither.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        kind = "an adapter" if ADAPTER_CONFIG in files else "a checkpoint"
        raise FileNotFoundError(
            f"`path` must be a folder with {kind}, or a name on the Hugging Face hub with its "
            "owner, `owner/name`, such as 'Qwen/Qwen3-0.6B'; there is no folder "
            f"{name!r}."
        )
    return _download(name, list(files or (WEIGHTS, "model-*.safetensors", INDEX, CONFIG, *CARRIED)))


def _download(name: str, patterns: list[str]) -> Path:
    hub = require("huggingface_hub", extra="models")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise FileNotFoundError(
            f"`path` {name!r} is not a local folder, and huggingface_hub could not fetch it: "
            f"{error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; errors name the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"A checkpoint needs `{path.name}`; there is none in {path.parent}.{_hint(path)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`{path.name}` in {path.parent} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"`{path.name}` in {path.parent} must hold an object of keys and values; it holds "
            f"{values!r:.40}. Fetch or save it again."
        )
    return values


def _hint(path: Path) -> str:
    """A hint if a model was given for an adapter, or an adapter for a model."""
    if path.name == CONFIG and path.with_name(ADAPTER_CONFIG).is_file():
        return " It holds an adapter: load the base, and give this folder to `models.load_lora`."
    if path.name == ADAPTER_CONFIG and path.with_name(CONFIG).is_file():
        return " It holds a whole model, not an adapter."
    return ""


def read_origin(folder: Path) -> Origin:
    """The small files that are copied with a policy."""
    return Origin(read_carried(folder), read_json(folder / CONFIG))


def read_carried(folder: Path) -> dict[str, bytes]:
    """The contents of the files to be copied, by name; in a subfolder by `folder/name`."""
    files = {file for pattern in CARRIED for file in folder.glob(pattern) if file.is_file()}
    contents = {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(files)}
    return {name: content for name, content in contents.items() if not _is_pickle(content)}


def is_carried(name: str) -> bool:
    """Whether a file or folder of this name is copied with a policy."""
    patterns = (pattern.split("/")[0] for pattern in CARRIED)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_pickle(content: bytes) -> bool:
    # A bare pickle, or PyTorch's zip archive of one. It could run code, whatever its name.
    return content.startswith((b"\x80", b"PK\x03\x04"))


class Weights:
    """The tensors of a folder: names, shapes and dtypes are read at once, contents on demand.

    **Arguments:**

    - `folder`: holds `model.safetensors`, or several files and their index. If it has both, the
        single file counts, as in `transformers`.
    - `file`: the name of the single file, if it is another.

    **Raises:**

    `ValueError` or `FileNotFoundError` if a file is missing, truncated or a pickle, or if the
    index names a tensor or file that does not exist.
    """

    def __init__(self, folder: Path, file: str = WEIGHTS):
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._stored: dict[str, str] = {}
        for path, named in _weight_files(folder, file).items():
            with _open(path) as opened:
                held = set(opened.keys())
                for name in sorted(named - held):
                    raise ValueError(f"{INDEX} says that {name!r} is in {path.name}; it is not.")
                # A tensor that is in two files is read from the file that the index names.
                for name in sorted(named | (held - self.files.keys())):
                    tensor = opened.get_slice(name)
                    self.files[name] = path
                    self.shapes[name] = tuple(tensor.get_shape())
                    self.dtypes[name] = tensor.get_dtype()

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or its part at `index`, copied out of the file."""
        stored = self._stored.get(name, name)
        # Open the file anew each time: pages of a file that stays mapped count as memory.
        with _open(self.files[name]) as opened:
            if index is None:
                return opened.get_tensor(stored)
            return opened.get_slice(stored)[tuple(slice(*bounds) for bounds in index)]

    def drop(self, name: str) -> None:
        """Leaves a tensor out."""
        for table in (self.files, self.shapes, self.dtypes):
            del table[name]

    def rename(self, name: str, new: str) -> None:
        """Gives a tensor another name than it has in its file."""
        self.files[new] = self.files.pop(name)
        self.shapes[new] = self.shapes.pop(name)
        self.dtypes[new] = self.dtypes.pop(name)
        self._stored[new] = name


def _weight_files(folder: Path, file: str) -> Mapping[Path, set[str]]:
    """The files that hold weights, and the tensors that the index lists for each."""
    if (folder / file).is_file():
        return {folder / file: set()}
    if file == WEIGHTS and (folder / INDEX).is_file():
        return _indexed_files(folder)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as {', '.join(pickles)}: a pickle, which can run any code "
            "when it is opened, so it is refused. Save the weights as safetensors, a model with "
            "`transformers` or an adapter with PEFT."
        )
    wanted = f"`{WEIGHTS}` or `{INDEX}`" if file == WEIGHTS else f"`{file}`"
    parts = sorted(p.name for p in folder.glob("*.safetensors"))
    hint = f", only {', '.join(parts[:3])}" + " ..." * (len(parts) > 3) if parts else ""
    raise FileNotFoundError(f"A checkpoint needs {wanted}; there is none in {folder}{hint}.")


def _indexed_files(folder: Path) -> Mapping[Path, set[str]]:
    """The files that the index names, and the tensors that it lists for each."""
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(part, str) for part in index.values()):
        raise ValueError(
            f"`weight_map` of {INDEX} in {folder} must map each tensor to its file; "
            f"got {shown(index)}. Fetch or save it again."
        )
    files: dict[Path, set[str]] = {}
    for name, part in index.items():
        if Path(part).name != part:
            raise ValueError(
                f"{INDEX} in {folder} must name files in the same folder; it says that {name!r} "
                f"is in {part!r}."
            )
        files.setdefault(folder / part, set()).add(name)
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise FileNotFoundError(
            f"{INDEX} names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            f"not in {folder}. Fetch or save the checkpoint again."
        )
    return files


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    safetensors = require("safetensors", extra="models")
    try:
        opened = safetensors.safe_open(file, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}); fetch or save it again."
        ) from None
    with opened as tensors:
        yield tensors
