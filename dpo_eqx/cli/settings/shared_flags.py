"""The flags that all commands except `train` share: which preferences, and how models are loaded.

The flags mean what they mean to `train`, since the same functions read them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ... import models
from ..._extras import require
from .options import dtype_of
from .settings import Dtype, Settings

Flags = TypeVar("Flags")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Preferences and the model whose tokenizer reads them."""

    model: str
    """A folder with `config.json`, safetensors and a tokenizer, or a hub name."""
    data: str
    """Preferences: JSON Lines, JSON, CSV, TSV, Parquet or Arrow (plain or compressed), a folder, or
    a hub name."""
    tokenizer: str | None = None
    """A folder or hub name of the tokenizer (default: the model's); `bytes` is the built-in one."""
    chat_template: str = "tokenizer"
    """The chat template of conversations: a file with a Jinja template, `none`, or `tokenizer` for
    the tokenizer's own."""
    as_chat: bool = False
    """Make turns of the user and the assistant from prompts and answers of text."""
    score: Literal["completion", "assistant", "last"] = "completion"
    """The scored tokens of a conversation's answers: all after the prompt, those of the assistant's
    turns, or those of its last turn. Messages with `weight: 0` are never scored."""
    split: str | None = None
    """The split of `--data`, if it has several (default: train)."""
    subset: str | None = None
    """The subset of `--data`, if it has several; the `config_name` on the hub."""
    columns: tuple[str, ...] = ()
    """Names of columns in the data, as `prompt=question` for a column `question` that holds the
    prompts. `weight=` ignores the column `weight`."""
    where: tuple[str, ...] = ()
    """Values that columns must have, as `lang=en`; other records are left out."""
    pairs: Literal["best-worst", "all", "best-rest"] = "best-worst"
    """The pairs of several answers with scores or ranks: the best and the worst one, all of unequal
    worth, or the best one with every worse one."""
    ties: Literal["drop", "half"] = "drop"
    """Two answers of equal worth: leave them out, or train both pairs with the weight 0.5."""
    max_length: int | None = None
    """Largest number of tokens of prompt plus completion; a longer completion loses its end. A row
    is dropped if its prompt alone fills the limit."""
    max_prompt_length: int | None = None
    """Largest number of tokens of a prompt, applied before `--max-length`; a longer prompt loses
    its start."""
    max_completion_length: int | None = None
    """Largest number of tokens of a completion; a longer completion loses its end."""

    def as_training(self, **other_settings: Any) -> Settings:
        """The settings of a run that reads the same data, with `other_settings` set as given."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Source)}
        shared["data"] = (self.data,)
        return Settings(**shared, output=Path(), **other_settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """How models are loaded, and which adapters the model of `--model` gets."""

    lora: str | None = None
    """Adapters to put on `--model`: a folder from PEFT, or the `adapter/` of a run."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the linear layers of every model in 8 or 4 bits."""
    dtype: Dtype | None = None
    """Parameter dtype (default: as stored in the checkpoint)."""
    fused: bool = True
    """Use cuDNN's attention kernel in half precision on a GPU that has it."""

    def load(self, path: str, *, lora: str | None = None) -> models.Transformer:
        """The model in the folder `path`, with the adapters in the folder `lora`, if given."""
        dtype = dtype_of(self.dtype)
        policy = language_model(
            models.load(path, dtype=dtype, quantize=self.quantize, fused=self.fused), path
        )
        return policy if lora is None else models.load_lora(policy, lora)


def language_model(model: models.Transformer | models.RewardModel, path: str) -> models.Transformer:
    """The model from `path`, or a `ValueError` if it is a reward model, which has no logits."""
    if isinstance(model, models.RewardModel):
        raise ValueError(
            f"`{path}` holds a reward model (`*ForSequenceClassification`), which writes no text. "
            "Give the folder of a language model (`*ForCausalLM`)."
        )
    return model


def parse_flags(
    kind: type[Flags], command: str, arguments: Sequence[str], *, positional: bool = False
) -> Flags:
    """The flags of a command as an instance of its dataclass.

    **Arguments:**

    - `kind`: the dataclass.
    - `command`: the name of the command.
    - `arguments`: the words after the command's name.
    - `positional`: whether required arguments are given by position, without a flag.

    **Raises:**

    `SystemExit`: with status 2, after a message, if the flags are wrong; with 0 after `--help`.
    """
    tyro = require("tyro", extra="train")
    config = (tyro.conf.PositionalRequiredArgs,) if positional else ()
    return tyro.cli(kind, args=list(arguments), prog=f"dpo-eqx {command}", config=config)


# What the commands that draw from a policy call two flags, besides their names in all commands.
OTHER_NAMES = {"--policy": "--model", "--prompts": "--data"}


def in_shared_names(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--model` for `--policy`, and with `--data` for `--prompts`."""
    parts = (word.partition("=") for word in arguments)
    return [OTHER_NAMES.get(name, name) + equals + value for name, equals, value in parts]


def check_writable(flag: str, path: Path | None) -> None:
    """Raises `OSError` if the file cannot be written, before the work rather than after it."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(
            f"`{flag}` must be a file to write; {path} is a folder. Give a file in it."
        )
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"`{flag}` must be a file in a folder that exists; got {path}. Make the folder "
            f"{path.parent} first."
        )
