"""Prompts for `generate`: from flags and files to token ids, through the chat template.

A file of preferences can also serve as a file of prompts, with the prompts that `train` would use.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...data._records.prompts import split_shared_prompt
from ...data._records.records import check_record, form_name, recognise
from ...data._records.shapes import first_of
from ...data._records.sources import open_source
from ...data._records.threads import assembled
from ...data._records.values import check_ids, check_messages, check_text
from ...data._tokens.parts import has_parts, join_parts, roles_with_parts
from ...data._tokens.tokenizers import as_ids, encode_all, special_id, start_id_of
from .texts import decode

Prompt = str | list


def read_prompts(
    path: str, limit: int | None, split: str | None = None
) -> list[tuple[str, Prompt]]:
    """The first `limit` prompts of a file, or of a split of a folder, each with its place in words.

    A `.txt` file holds a prompt on each line. Other files hold records with `prompt` (text or
    messages), with `prompt_ids`, or with `chosen` and `rejected` that share a prompt.

    **Raises:**

    `ValueError` or `FileNotFoundError` if there is no prompt.
    """
    is_text = Path(path).suffix == ".txt" and Path(path).is_file()
    found = _lines(Path(path)) if is_text else _records(path, split)
    prompts = list(itertools.islice(found, limit))
    if not prompts:
        raise ValueError(f"`--data` must hold a prompt at least; {path} holds none.")
    return prompts


def encode_prompt(tokenizer: Any, prompt: Prompt, where: str, *, chat: bool) -> list[int]:
    """The ids of a prompt, with the generation prompt of the chat template if one applies.

    **Arguments:**

    - `prompt`: text, messages, or ids.
    - `where`: the prompt's place in words, for errors.
    - `chat`: whether a text goes through the chat template, if there is one, as the user's turn.

    **Raises:**

    `ValueError` if there are messages but no template, or if the prompt is empty and cannot be
    replaced by a BOS or EOS.
    """
    if isinstance(prompt, list) and all(type(item) is int for item in prompt):
        return _not_empty(prompt, tokenizer, where)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str) and not (chat and has_template):
        ids = encode_all(tokenizer, [prompt])[0]
        # The tokenizer may add an EOS by itself, after which a model would not answer.
        is_ended = len(ids) > 1 and ids[-1] == special_id(tokenizer, "eos")
        return _not_empty(ids[:-1] if is_ended else ids, tokenizer, where)
    if not has_template:
        raise ValueError(
            f"{where} is a conversation, and the tokenizer has no chat template. Give text, or "
            "take a model with a template."
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if has_parts(messages):
        messages = join_parts(messages, roles_with_parts(tokenizer, {}))
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    except Exception as error:  # a template can raise anything
        raise ValueError(f"{where} does not go through the chat template: {error}") from error
    return as_ids(ids)


def shown(tokenizer: Any, prompt: Prompt) -> str:
    """A prompt for people to read: the text, the turns, or the decoded ids."""
    if isinstance(prompt, str):
        return prompt
    if all(type(item) is int for item in prompt):
        return decode(tokenizer, prompt)
    return "\n".join(f"[{turn['role']}] {turn.get('content')}" for turn in prompt)


def _lines(path: Path) -> Iterator[tuple[str, Prompt]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}.") from None
    return ((f"line {n} of {path}", line) for n, line in enumerate(lines, 1) if line.strip())


def _records(path: str, split: str | None) -> Iterator[tuple[str, Prompt]]:
    records = assembled(open_source(path, split)(), {}, Counter())
    return ((where, _prompt_of(record, where)) for where, record in records)


def _prompt_of(record: Mapping[str, Any], where: str) -> Prompt:
    if "prompt_ids" in record:
        return check_ids(record["prompt_ids"], f"`prompt_ids` in {where}")
    record = first_of(record, where)
    form = recognise(record, where) if _is_preference(record) else None
    if form is not None:
        checked = check_record(record, form, where)
        if "prompt" in checked:
            return checked["prompt"]
        return split_shared_prompt(checked["chosen"], checked["rejected"])[0]
    if record.get("prompt") is None:
        raise ValueError(
            f"{where} must have a `prompt`, or `chosen` and `rejected` that begin with it; found: "
            f"{', '.join(f'`{name}`' for name in record) or 'nothing'}."
        )
    return _checked(record["prompt"], f"`prompt` in {where}")


def _is_preference(record: Mapping[str, Any]) -> bool:
    """Whether `train` would take the record."""
    answers = [record.get(name) for name in ("chosen", "rejected")]
    return None not in answers or form_name(record) == "unpaired"


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
