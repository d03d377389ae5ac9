"""Prompts for `generate`: from flags and files to token ids, through the chat template.

A file of preferences is one of prompts, too: the prompt is then what `train` would take for it.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.prompts import split_shared_prompt
from ..data.records import check_ids, check_messages, check_text, is_redundant
from ..data.sources import open_source
from ..data.tokenizers import as_ids, encode_all, special_id, start_id_of
from .texts import decode

Prompt = str | list


def read_prompts(path: str, limit: int | None) -> list[tuple[str, Prompt]]:
    """The first `limit` prompts of a file, each with where it stands.

    A `.txt` holds one a line; records hold `prompt`, text or messages, or `prompt_ids`, or
    `chosen` and `rejected` that begin with it.

    **Raises:**

    `ValueError` or `FileNotFoundError` where there are none.
    """
    is_text = Path(path).suffix == ".txt" and Path(path).is_file()
    found = _lines(Path(path)) if is_text else _records(path)
    prompts = list(itertools.islice(found, limit))
    if not prompts:
        raise ValueError(f"`--data` must hold a prompt at least; {path} holds none.")
    return prompts


def encode_prompt(tokenizer: Any, prompt: Prompt, where: str, *, chat: bool) -> list[int]:
    """The ids of a prompt, ready for an answer.

    **Arguments:**

    - `prompt`: text, messages, or ids.
    - `where`: in words, for errors.
    - `chat`: whether a text goes through the chat template, where there is one, as the user's turn.

    **Raises:**

    `ValueError` where messages meet no template, or nothing is there to begin from.
    """
    if isinstance(prompt, list) and all(type(item) is int for item in prompt):
        return _not_empty(prompt, tokenizer, where)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str) and not (chat and has_template):
        ids = encode_all(tokenizer, [prompt])[0]
        is_ended = len(ids) > 1 and ids[-1] == special_id(tokenizer, "eos")
        return _not_empty(ids[:-1] if is_ended else ids, tokenizer, where)
    if not has_template:
        raise ValueError(
            f"{where} is a conversation, and the tokenizer has no chat template. Give text, or a "
            "model with a template."
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    except Exception as error:  # a template raises whatever it likes
        raise ValueError(f"{where} does not go through the chat template: {error}") from error
    return as_ids(ids)


def shown(tokenizer: Any, prompt: Prompt) -> str:
    """A prompt for people: the text, the turns, or what the ids say."""
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


def _records(path: str) -> Iterator[tuple[str, Prompt]]:
    return ((where, _prompt_of(record, where)) for where, record in open_source(path, None)())


def _prompt_of(record: Mapping[str, Any], where: str) -> Prompt:
    if "prompt_ids" in record:
        return check_ids(record["prompt_ids"], f"`prompt_ids` in {where}")
    answers = [record.get(name) for name in ("chosen", "rejected")]
    prompt = record.get("prompt")
    if prompt is not None and not is_redundant(prompt, answers[0]):
        return _checked(prompt, f"`prompt` in {where}")
    if None in answers:
        raise ValueError(
            f"{where} must have a `prompt`, or `chosen` and `rejected` that begin with it; found: "
            f"{', '.join(f'`{name}`' for name in record) or 'nothing'}."
        )
    return split_shared_prompt(*(_checked(a, f"an answer in {where}") for a in answers))[0]


def _checked(value: Any, what: str) -> Any:
    return check_messages(value, what) if isinstance(value, list) else check_text(value, what)


def _not_empty(ids: list[int], tokenizer: Any, where: str) -> list[int]:
    """`ids`, or what may stand in place of an empty prompt."""
    if ids:
        return ids
    start = start_id_of(tokenizer)
    if start is None:
        raise ValueError(
            f"{where} must not be empty, since the tokenizer has no BOS or EOS. Give some text."
        )
    return [start]
