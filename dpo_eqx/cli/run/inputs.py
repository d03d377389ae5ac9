"""What a run reads, as digests: a continued run must read the same.

`folder.py` keeps them in `run.json`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data._fingerprint import digest, digest_files
from ...data._tokens.store import digest_ids
from ...models._checkpoint.folder import resolve
from ..compose.data import Prepared
from ..compose.functions import file_of, load_function
from ..settings.options import is_function
from ..settings.settings import Settings
from ..settings.words import naming

_WHOLE = 2**26  # files up to this size are read as a whole
_SAMPLES, _SAMPLE = 256, 2**16
_OF_TOKENS = "tokens of "
# What is read from files of text, and not from those of weights.
_READ = ("--data", "--eval-data", "--reward", "--optimizer")

_FILES = (
    "{flag} must have the same content as when the run in {folder} started; it has changed. Give "
    "the same file, or another `--output`."
)
_TOKENS = (
    "The tokens of {flag} are others than when the run in {folder} started, though its records are "
    "the same: the tokenizer or its chat template has changed, or the template writes today's "
    "date. Give the same, or another `--output`."
)
_WEIGHTS = (
    "The weights of {flag} are others than when the run in {folder} started. Give the same, or "
    "another `--output`."
)


def digests_of(settings: Settings, prepared: Sequence[Prepared]) -> dict[str, str | None]:
    """A digest of each input of a run, by its name."""
    digests = {}
    for number, source in enumerate(prepared):
        flag = f"--eval-data {source.name}".rstrip() if number else "--data"
        digests[flag] = source.fingerprint
        digests[_OF_TOKENS + flag] = digest_ids(source.rows)
    for flag in ("model", "reference", "lora"):
        path = getattr(settings, flag)
        if path is not None:
            digests[f"--{flag}"] = digest_weights(resolve(path))
    if is_function(settings.optimizer):
        function = load_function(settings.optimizer, "--optimizer")
        digests["--optimizer"] = _digest_function(settings.optimizer, function)
    return digests


def check_same(
    before: Mapping[str, str | None], now: Mapping[str, str | None], folder: Path
) -> None:
    """Raises `ValueError` if an input is another than at the start of the run in `folder`."""
    for name, digest_now in now.items():
        if before.get(name) in (None, digest_now):
            continue
        message = _FILES if name.startswith(_READ) else _WEIGHTS
        message = _TOKENS if name.startswith(_OF_TOKENS) else message
        raise ValueError(message.format(flag=f"`{name.removeprefix(_OF_TOKENS)}`", folder=folder))


def digest_weights(folder: Path) -> str:
    """A digest of the weights in a folder.

    If a file has more than 64 MB, its size and 256 parts of it are read: training changes all of
    them, and reading many gigabytes would delay each start.
    """
    files = sorted(folder.glob("*.safetensors"))
    return digest([(file.name, _digest_file(file)) for file in files])


def digest_reward(reward: str, function: Callable[..., Any] | None) -> str:
    """A digest of `--reward`: of the file of a Python function, or of a model's weights."""
    if function is None:
        with naming("--reward"):
            return digest_weights(resolve(reward))
    return _digest_function(reward, function)


def _digest_function(named: str, function: Callable[..., Any]) -> str:
    """A digest of the file of a Python function; of its name if it has no file."""
    file = file_of(function)
    return digest(named) if file is None else digest_files([file])


def _digest_file(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _WHOLE:
            return hashlib.file_digest(opened, "blake2b").hexdigest()
        state = hashlib.blake2b(str(size).encode())
        for number in range(_SAMPLES):
            opened.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
            state.update(opened.read(_SAMPLE))
        return state.hexdigest()
