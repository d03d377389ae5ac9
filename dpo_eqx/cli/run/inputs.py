"""What a run reads, as digests: a continued run must read the same.

`folder.py` keeps them in `run.json`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...data._fingerprint import digest
from ...data._tokens.store import digest_ids
from ...models._checkpoint.folder import resolve
from ..compose.data import Prepared
from ..settings.settings import Settings

_WHOLE = 2**26  # files up to this size are read as a whole
_SAMPLES, _SAMPLE = 256, 2**16

_REMEDY = "Give the same, or another `--output`."
_TOKENS = (
    "the tokens of {0} are others than when the run in {1} started, though its records are the "
    "same: the tokenizer or its chat template has changed, or the template writes today's date. "
)
_WEIGHTS = "the weights of {0} are others than when the run in {1} started. "


def digests_of(settings: Settings, prepared: Sequence[Prepared]) -> dict[str, str | None]:
    """A digest of each input of a run, by its name."""
    digests = {}
    for flag, source in zip(("--data", "--eval-data"), prepared, strict=False):
        digests[flag] = source.fingerprint
        digests[f"tokens of {flag}"] = digest_ids(source.rows)
    for flag in ("model", "reference", "lora"):
        path = getattr(settings, flag)
        if path is not None:
            digests[f"--{flag}"] = digest_weights(resolve(path))
    return digests


def check_same(
    before: Mapping[str, str | None], now: Mapping[str, str | None], folder: Path
) -> None:
    """Raises `ValueError` if an input is another than at the start of the run in `folder`."""
    for name in now:
        if before.get(name) is None or before[name] == now[name]:
            continue
        flag = f"`{name.removeprefix('tokens of ')}`"
        if name.startswith("tokens of "):
            words = _TOKENS.format(flag, folder)
        elif name in ("--data", "--eval-data"):
            words = (
                f"{flag} must have the same content as when the run in {folder} started; it has "
                "changed. "
            )
        else:
            words = _WEIGHTS.format(flag, folder)
        remedy = _REMEDY if "content" not in words else "Give the same file, or another `--output`."
        raise ValueError(words[0].upper() + words[1:] + remedy)


def digest_weights(folder: Path) -> str:
    """A digest of the weights in a folder.

    If a file has more than 64 MB, its size and 256 parts of it are read: training changes all of
    them, and reading many gigabytes would delay each start.
    """
    files = sorted(folder.glob("*.safetensors"))
    return digest([(file.name, _digest_file(file)) for file in files])


def _digest_file(file: Path) -> str:
    size = file.stat().st_size
    state = hashlib.blake2b(str(size).encode())
    with file.open("rb") as opened:
        if size <= _WHOLE:
            return hashlib.file_digest(opened, "blake2b").hexdigest()
        for number in range(_SAMPLES):
            opened.seek(number * (size - _SAMPLE) // (_SAMPLES - 1))
            state.update(opened.read(_SAMPLE))
    return state.hexdigest()
