"""The flags that all commands except `train` share: which preferences, and how models are loaded.

The flags mean what they mean to `train`, since the same functions read them.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jax.sharding import Mesh

from ... import models, sharding
from ..._extras import require
from .groups.memory import CompilationFlags, Dtype
from .groups.reading import Reading
from .help import grouped, ungrouped
from .options import dtype_of
from .settings import Settings
from .words import naming

Flags = TypeVar("Flags")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(Reading):
    """Preferences and the model whose tokenizer reads them."""

    model: str
    """A folder with `config.json`, safetensors and a tokenizer, or a hub name."""
    data: str
    """Preferences: JSON Lines, JSON, CSV, TSV, Parquet or Arrow (plain or compressed), a folder, or
    a hub name."""

    def as_training(self, **other_settings: Any) -> Settings:
        """The settings of a run that reads the same data, with `other_settings` set as given."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(Source)}
        shared["data"] = (self.data,)
        return Settings(**shared, output=Path(), **other_settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading(CompilationFlags):
    """How models are loaded, and which adapters the model of `--model` gets."""

    lora: str | None = None
    """Adapters to put on `--model`: a folder from PEFT, or the `adapter/` of a run."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the linear layers of every model in 8 or 4 bits."""
    dtype: Dtype | None = None
    """Parameter dtype (default: as stored in the checkpoint)."""
    fused: bool = True
    """Use the attention kernel of the GPU or the TPU, if there is one that fits."""
    mesh: str | None = None
    """The mesh of devices, `data=4,fsdp=2,tensor=1`. Rows are split over data and fsdp, parameters
    over fsdp and tensor. With `expert=4` in place of `fsdp=4`, each device keeps some of the
    experts of a mixture (default: one device)."""

    def load(self, path: str, *, lora: str | None = None) -> models.Transformer:
        """The model in the folder `path`, with the adapters in the folder `lora`, if given."""
        mesh = self.devices()
        model = models.load(
            path,
            dtype=dtype_of(self.dtype),
            quantize=self.quantize,
            fused=self.fused,
            sharding=None if mesh is None else sharding.placement(mesh),
        )
        policy = language_model(model, path)
        if lora is None:
            return policy
        with naming("--lora"):
            return language_model(models.load_lora(policy, lora), lora)

    def devices(self) -> Mesh | None:
        """The mesh that `--mesh` asks for, if it is given."""
        return None if self.mesh is None else sharding.make_mesh(self.mesh)


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
    made = tyro.cli(grouped(kind), args=list(arguments), prog=f"dpo-eqx {command}", config=config)
    return kind(**ungrouped(made))


# Other names of flags in the commands that draw from a policy.
OTHER_NAMES = {
    "--policy": "--model",
    "--prompts": "--data",
    "--max-tokens": "--max-new-tokens",
}


def in_shared_names(arguments: Sequence[str]) -> list[str]:
    """The arguments with each of `OTHER_NAMES` replaced by the name that all commands share."""
    parts = (word.partition("=") for word in arguments)
    return [
        OTHER_NAMES.get(name.replace("_", "-"), name) + equals + value
        for name, equals, value in parts
    ]


def in_given_names(message: str, arguments: Sequence[str]) -> str:
    """`message` with the name of each flag that the user gave, in place of the shared one."""
    given = {word.partition("=")[0].replace("_", "-") for word in arguments}
    for name, shared in OTHER_NAMES.items():
        if name in given and shared not in given:
            message = re.sub(rf"`{shared}(?=[` =])", f"`{name}", message)
    return message


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
