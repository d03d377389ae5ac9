"""The flags that commands beside `train` share: which preferences, and how models are loaded.

They mean what they mean to `train`, by the same functions.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from ... import models
from ..._extras import require
from .options import dtype_of
from .settings import Dtype, Settings

Flags = TypeVar("Flags")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Preferences and the model whose tokenizer reads them."""

    model: str
    """A folder with `config.json`, safetensors and a tokenizer, or a name of the hub."""
    data: str
    """Preferences: JSON Lines (plain or gzip), Parquet, a folder, or a name of the hub."""
    tokenizer: str | None = None
    """Where it is not in the folder of the model; `bytes` is the built-in one of bytes."""
    columns: tuple[str, ...] = ()
    """Names of columns, ours first: `prompt=question`. `weight=` leaves that column out."""
    max_length: int | None = None
    """Tokens of prompt and completion; the start is kept. A prompt as long drops its row."""
    max_prompt_length: int | None = None
    """Tokens of a prompt, applied first; the end is kept."""
    max_completion_length: int | None = None
    """Tokens of a completion; the start is kept."""

    def as_training(self, **more) -> Settings:
        """The settings of a run that reads the same data; `more` are further ones of these."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Source)}
        return Settings(**shared, output=Path(), **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded, and what is put on the first of them."""

    lora: str | None = None
    """Adapters to put on `--model`: a folder as PEFT or a run's `adapter/` holds them."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the linear layers of every model in 8 or 4 bits."""
    dtype: Dtype | None = None
    """Of the parameters; by default that of the file."""
    fused: bool = True
    """Whether attention in half precision goes through cuDNN's kernel on a GPU that has it."""

    def load(self, path: str, *, lora: str | None = None) -> models.Transformer:
        """The model in a folder, with the adapters in another if there are any."""
        dtype = dtype_of(self.dtype)
        policy = models.load(path, dtype=dtype, quantize=self.quantize, fused=self.fused)
        return policy if lora is None else models.load_lora(policy, lora)


def parse_flags(
    kind: type[Flags], command: str, arguments: Sequence[str], *, positional: bool = False
) -> Flags:
    """The flags of a command as its dataclass; those that must be given as words if `positional`.

    **Raises:**

    `SystemExit` with status 2, after a message, where they are wrong, and 0 after `--help`.
    """
    tyro = require("tyro", extra="train")
    config = (tyro.conf.PositionalRequiredArgs,) if positional else ()
    return tyro.cli(kind, args=list(arguments), prog=f"dpo-eqx {command}", config=config)


def check_writable(flag: str, path: Path | None) -> None:
    """Raises where a file could not be written, before the work rather than after it."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"`{flag}` must be a file to write; {path} is a folder.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"`{flag}` must be a file in a folder that exists; there is no {path.parent}."
        )
