"""Prompts for `generate`: from flags and files to token ids, through the chat template.

A file of preferences can also serve as a file of prompts, with the prompts that `train` would use.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...data._records.prompts import split_shared_prompt
from ...data._records.records import check_columns, check_record, form_name, recognise, rename
from ...data._records.shapes import first_of
from ...data._records.sources import open_source
from ...data._records.template_columns import check_for_template
from ...data._records.threads import assembled
from ...data._records.values import check_ids, check_messages, check_text
from ...data._tokens.encoder import Encoder
from ...data._tokens.parts import join_parts
from ...data._tokens.template import conversation_of, prompt_ids
from ...data._tokens.tokenizers import encode_all, special_id, start_id_of
from ..settings.options import split_columns, split_pairs
from .texts import decode


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt to answer.

    - `value`: text, messages, or ids.
    - `where`: its place in words, for errors.
    - `columns`: the record's `tools` and `chat_template_kwargs`, if it has them.
    - `is_trained`: whether it is the prompt of a preference, whose text training reads as it is,
        without the chat template.
    """

    value: str | list
    where: str
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_trained: bool = False

    @property
    def ids(self) -> list[int] | None:
        """The prompt, if it is token ids already."""
        if isinstance(self.value, list) and all(type(item) is int for item in self.value):
            return self.value
        return None


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the records of a source are read; the arguments are those of `data.read`."""

    split: str | None = None
    subset: str | None = None
    columns: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    where: Mapping[str, str] = dataclasses.field(default_factory=dict)
    as_chat: bool = False

    @staticmethod
    def of(flags: Any, *, as_chat: bool = False) -> "Reading":
        """How flags, or settings, say that the records of a source are read."""
        return Reading(
            flags.split,
            flags.subset,
            split_columns(flags.columns),
            split_pairs(flags.where, "--where"),
            as_chat=as_chat,
        )


ALL = Reading()


def read_prompts(path: str, limit: int | None, reading: Reading = ALL) -> list[Prompt]:
    """The first `limit` prompts of a file, or of a split of a folder.

    A `.txt` file holds a prompt on each line. Other files hold records with `prompt` (text or
    messages), with `prompt_ids`, or preferences.

    **Raises:**

    `ValueError` or `FileNotFoundError` if there is no prompt, or if a text file is given with
    choices that are for records.
    """
    left_out: Counter[str] = Counter()
    is_text = Path(path).suffix == ".txt" and Path(path).is_file()
    if is_text:
        _check_for_text(reading)
    found = _lines(Path(path)) if is_text else _records(path, reading, left_out)
    prompts = list(itertools.islice(found, limit))
    if not prompts:
        reasons = "".join(f"; left out {n}: {what}" for what, n in left_out.items())
        raise ValueError(f"`--data` must hold a prompt at least; {path} holds none{reasons}.")
    return prompts


def _check_for_text(reading: Reading) -> None:
    for field in dataclasses.fields(Reading):
        if getattr(reading, field.name):
            name = field.name.replace("_", "-")
            raise ValueError(
                f"`--{name}` is for records; `--data` is a text file with a prompt on each line. "
                f"Leave out `--{name}`."
            )


def encode_prompt(tokenizer: Any, prompt: Prompt, *, chat: bool) -> list[int]:
    """The ids of a prompt, with the generation prompt of the chat template if one applies.

    **Arguments:**

    - `chat`: whether a text goes through the chat template, if there is one, as the user's turn.

    **Raises:**

    `ValueError` if there are messages but no template, or if the prompt is empty and cannot be
    replaced by a BOS or EOS.
    """
    value = prompt.value
    if prompt.ids is not None:
        return _not_empty(prompt.ids, tokenizer, prompt.where)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(value, str) and not (chat and has_template and not prompt.is_trained):
        ids = encode_all(tokenizer, [value])[0]
        # The tokenizer may add an EOS by itself, after which a model would not answer.
        is_ended = len(ids) > 1 and ids[-1] == special_id(tokenizer, "eos")
        return _not_empty(ids[:-1] if is_ended else ids, tokenizer, prompt.where)
    if not has_template:
        raise ValueError(
            f"{prompt.where} is a conversation, and the tokenizer has no chat template. Give text, "
            "or take a model with a template."
        )
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    # The same functions as for training, so that the prompt is the same.
    encoder = Encoder(tokenizer)
    conversation = conversation_of(prompt.columns, (messages,), (), encoder, prompt.where)
    return prompt_ids(conversation, encoder)


def shown(tokenizer: Any, prompt: Prompt) -> str:
    """A prompt for people to read: the text, the turns, or the decoded ids."""
    if isinstance(prompt.value, str):
        return prompt.value
    if prompt.ids is not None:
        return decode(tokenizer, prompt.ids)
    turns = join_parts(prompt.value, roles=())
    return "\n".join(f"[{turn['role']}] {_content(turn)}" for turn in turns)


def stored(tokenizer: Any, prompt: Prompt) -> str | list:
    """A prompt for a file: the text or the messages themselves, or the decoded ids."""
    return prompt.value if prompt.ids is None else decode(tokenizer, prompt.ids)


def _content(turn: Mapping[str, Any]) -> str:
    """The text of a turn, and its tool calls as JSON."""
    content, calls = turn.get("content") or "", turn.get("tool_calls")
    return content + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _lines(path: Path) -> Iterator[Prompt]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}.") from None
    # Lines end at line feeds alone, not at the separators of Unicode.
    lines = enumerate(text.split("\n"), 1)
    stripped = ((number, line.removesuffix("\r")) for number, line in lines)
    return (Prompt(line, f"line {n} of {path}") for n, line in stripped if line.strip())


def _records(path: str, reading: Reading, left_out: Counter[str]) -> Iterator[Prompt]:
    records = open_source(path, reading.split, reading.subset)()
    columns = check_columns(reading.columns)
    for where, record in assembled(records, reading.where, left_out):
        yield _prompt_of(rename(record, columns, where), where, as_chat=reading.as_chat)


def _prompt_of(record: Mapping[str, Any], where: str, *, as_chat: bool) -> Prompt:
    if "prompt_ids" in record:
        return Prompt(check_ids(record["prompt_ids"], f"`prompt_ids` in {where}"), where)
    record = first_of(record, where, as_chat=as_chat)
    form = recognise(record, where) if _is_preference(record) else None
    if form is not None:
        checked = check_record(record, form, where)
        value = checked.get("prompt")
        if value is None:
            value = split_shared_prompt(checked["chosen"], checked["rejected"])[0]
        return Prompt(value, where, checked, is_trained=True)
    if record.get("prompt") is None:
        raise ValueError(
            f"{where} must have a `prompt`, or `chosen` and `rejected` that begin with it; found: "
            f"{', '.join(f'`{name}`' for name in record) or 'nothing'}."
        )
    value = _checked(record["prompt"], f"`prompt` in {where}")
    return Prompt(value, where, check_for_template(record, where))


def _is_preference(record: Mapping[str, Any]) -> bool:
    """Whether `train` would take the record."""
    answers = [record.get(name) for name in ("chosen", "rejected")]
    return None not in answers or form_name(record) in ("unpaired", "completion")


def _checked(value: Any, what: str) -> Any:
    return check_messages(value, what) if isinstance(value, list) else check_text(value, what)


def _not_empty(ids: list[int], tokenizer: Any, where: str) -> list[int]:
    """`ids`, or the token that replaces an empty prompt."""
    if ids:
        return ids
    start = start_id_of(tokenizer)
    if start is None:
        raise ValueError(
            f"{where} must not be empty, since the tokenizer has no BOS or EOS. Give some text."
        )
    return [start]
