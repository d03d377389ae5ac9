"""The flags of every command that reads text: which records, and how they become tokens."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordFlags:
    """Which records are read."""

    split: str | None = None
    """The split of `--data`, if it has several (default: train)."""
    subset: str | None = None
    """The subset of `--data`, if it has several; the `config_name` on the hub."""
    columns: tuple[str, ...] = ()
    """Names of columns in the data, as `prompt=question` for a column `question` that holds the
    prompts. `weight=` ignores the column `weight`."""
    where: tuple[str, ...] = ()
    """Values that columns must have, as `lang=en`; other records are left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFlags:
    """How texts become tokens."""

    tokenizer: str | None = None
    """A folder or hub name of the tokenizer (default: the model's); `bytes` is the built-in one."""
    chat_template: str = "tokenizer"
    """The chat template of conversations: a file with a Jinja template, `none`, or `tokenizer` for
    the tokenizer's own."""
    as_chat: bool = False
    """Make turns of the user and the assistant from prompts and answers of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(TextFlags, RecordFlags):
    """How preferences are read."""

    score: Literal["completion", "assistant", "last"] = "completion"
    """The scored tokens of a conversation's answers: all after the prompt, those of the assistant's
    turns, or those of its last turn. Messages with `weight: 0` are never scored."""
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
