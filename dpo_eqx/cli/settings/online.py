"""Every setting of `dpo-eqx online`: those of `train` that a round has a use for, and its own.

`check.py` checks the settings of `train` among them.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

from .check import check_positive, flag
from .settings import Settings
from .sources import sources_of


def _unused(default: Any = None) -> Any:
    """A setting of `train` that `online` does not offer as a flag."""
    return dataclasses.field(init=False, default=default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Online(Settings):
    """Trains a policy on pairs of its own answers, which a reward judges, in rounds."""

    command: ClassVar[str] = "online"

    model: str
    """The policy to train: a folder with `config.json`, safetensors and a tokenizer, or a hub name.
    `--policy` is the same flag."""
    data: tuple[str, ...]
    """Prompts: a `.txt` with one on each line, records with `prompt`, or preferences. `--prompts`
    is the same flag."""
    reward: str
    """The folder or hub name of a reward model, or a Python function as `module:function` or
    `file.py:function`. It is called with a list of prompts and a list of answers, and returns a
    number for each answer."""
    reward_template: str = "tokenizer"
    """The chat template of a reward model: a file with a Jinja template, `none`, or `tokenizer` for
    its tokenizer's own."""
    reward_timeout: float = 600.0
    """The longest time that a call of a Python function may take, in seconds."""

    samples: int = 4
    """Number of answers to each prompt in a round."""
    how: Literal["best_worst", "all", "random"] = "best_worst"
    """The pairs of a prompt: its best and its worst answer, all pairs, or one random pair."""
    min_gap: float = 0.0
    """Pairs whose rewards differ by less are not trained on. Neither are pairs of equal rewards."""
    max_new_tokens: int = 256
    """Largest number of tokens in an answer, which ends at the EOS if that is drawn first."""
    temperature: float = 1.0
    """Sampling temperature, by which logits are divided."""
    top_k: int | None = None
    """Number of likeliest tokens to sample from (default: all)."""
    top_p: float | None = None
    """Sample from the fewest likeliest tokens whose probabilities sum to at least this."""
    min_p: float | None = None
    """Sample from the tokens at least this times as likely as the likeliest one."""

    steps: int | None = None
    """Largest number of rounds, with an optimiser step each (default: set by `--epochs`)."""
    epochs: int | None = None
    """Largest number of passes through the prompts (default: 1, or no limit if `--steps` is
    given)."""
    batch_size: int = 8
    """Number of prompts in a round."""
    seed: int = 0
    """Random seed of the order of the prompts, of the answers, of new adapters and of dropout."""
    buckets: int = 1
    """Number of widths that prompts are padded to. Each width is compiled once."""
    max_prompt_length: int | None = None
    """Largest number of tokens of a prompt; a longer prompt loses its start."""
    sync_reference_every: int = 0
    """Number of rounds between moves of the reference towards the policy; 0 keeps it fixed."""
    mesh: str | None = None
    """The mesh of devices, `data=4,fsdp=2,tensor=1`. Prompts are split over data and fsdp,
    parameters over fsdp and tensor. With `expert=4` in place of `fsdp=4`, each device keeps some of
    the experts of a mixture (default: one device, or the devices of all processes along data if
    there are several processes)."""
    report: bool = True
    """Keep some answers from the start and the end, and write `report.html`."""

    eval_data: tuple[str, ...] = _unused(())
    eval_fraction: float | None = _unused()
    eval_split: str | None = _unused()
    eval_every: int = _unused(0)
    eval_at_start: bool = _unused(True)
    keep_best: str | None = _unused()
    early_stop: int | None = _unused()
    score: Literal["completion", "assistant", "last"] = _unused("completion")
    pairs: Literal["best-worst", "all", "best-rest"] = _unused("best-worst")
    ties: Literal["drop", "half"] = _unused("drop")
    offset_column: str | None = _unused()
    reward_head: bool = _unused(False)
    average: Literal["tokens", "rows"] | None = _unused()
    max_length: int | None = _unused()
    max_completion_length: int | None = _unused()
    strict: bool = _unused(False)
    precompute_reference: bool = _unused(False)
    pack: bool = _unused(False)
    pack_length: int | None = _unused()
    cache: Path | None = dataclasses.field(init=False, default=None)

    @property
    def prompts(self) -> str:
        """The source of the prompts."""
        return sources_of(self.data)[0].path


def check_online(settings: Online) -> None:
    """Raises `ValueError` if a setting that `train` does not have is wrong."""
    if len(settings.data) != 1:
        raise ValueError(
            f"`--data` must be one source of prompts; got {len(settings.data)}. Put the prompts "
            "into one file."
        )
    for name in ("samples", "max_new_tokens", "temperature", "top_k", "reward_timeout"):
        check_positive(name, getattr(settings, name))
    for name in ("top_p", "min_p"):
        check_share(name, getattr(settings, name))
    if settings.samples < 2:
        raise ValueError(
            f"`--samples` must be at least 2, since a pair has two answers; got {settings.samples}."
        )
    if not 0 <= settings.min_gap < math.inf:
        raise ValueError(f"`--min-gap` must not be negative; got {settings.min_gap}.")


def check_share(name: str, value: float | None) -> None:
    """Raises `ValueError` if the value of the flag of the field `name` is not in (0, 1]."""
    if value is not None and not 0 < value <= 1:
        raise ValueError(f"{flag(name)} must be in (0, 1]; got {value}.")
