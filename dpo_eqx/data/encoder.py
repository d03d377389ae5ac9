"""A tokenizer with all that decides which ids it gives: the EOS, and the chat template.

Where a completion starts in those ids is decided in `tokenize.py`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .records import Form
from .tokenizers import as_ids, encode_all, special_id


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tokenizer with all that decides which ids it gives.

    - `eos_text`, `eos_id`: what is added after a completion of text, at most one of them.
    - `start_id`: what may stand before an empty prompt.
    - `template`: keywords for `apply_chat_template`.
    """

    tokenizer: Any
    eos_text: str = ""
    eos_id: int | None = None
    start_id: int | None = None
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def make_encoder(
    tokenizer: Any, form: Form, append_eos: bool, eos_id: int | None, template: Mapping[str, Any]
) -> Encoder:
    """The encoder for records of `form`: which EOS is added, and how, is decided here.

    **Raises:**

    `ValueError` for a tokenizer without `encode`, EOS or chat template where one is needed.
    """
    if form.tokenized:
        return Encoder(tokenizer, start_id=_start(tokenizer))
    if not hasattr(tokenizer, "encode"):
        raise ValueError(
            f"`tokenizer` must have `encode(text)`, got {type(tokenizer).__name__}. Take "
            "`load_tokenizer(path)` or `ByteTokenizer()`."
        )
    eos_id = special_id(tokenizer, "eos") if eos_id is None else eos_id
    start = _start(tokenizer) if _start(tokenizer) is not None else eos_id
    if form.conversational:
        _check_template(tokenizer, template)
        return Encoder(tokenizer, start_id=start, template=template)
    if not append_eos or _adds(tokenizer, "", eos_id):
        return Encoder(tokenizer, start_id=start)
    text = getattr(tokenizer, "eos_token", None)
    # Text, as TRL adds it, so that what comes before it is tokenised as there.
    if isinstance(text, str) and text and (eos_id is None or _adds(tokenizer, text, eos_id)):
        return Encoder(tokenizer, eos_text=text, start_id=start)
    if eos_id is None:
        raise ValueError(
            f"`tokenizer` must have an EOS, and {type(tokenizer).__name__} tells of none. Give "
            "`eos_token_id=`, or `append_eos=False` if completions are to end without one."
        )
    return Encoder(tokenizer, eos_id=eos_id, start_id=start)


def _start(tokenizer: Any) -> int | None:
    bos = special_id(tokenizer, "bos")
    return special_id(tokenizer, "eos") if bos is None else bos


def _adds(tokenizer: Any, text: str, eos_id: int | None) -> bool:
    """Whether the ids of a text followed by `text` end with the EOS."""
    return eos_id is not None and encode_all(tokenizer, ["a" + text])[0][-1:] == [eos_id]


def _check_template(tokenizer: Any, template: Mapping[str, Any]) -> None:
    has = hasattr(tokenizer, "apply_chat_template")
    if has and (getattr(tokenizer, "chat_template", True) or template.get("chat_template")):
        return
    raise ValueError(
        f"`tokenizer` must have a chat template for conversations; {type(tokenizer).__name__} has "
        "none. Take one that has, set `tokenizer.chat_template`, or give it as "
        '`template_arguments={"chat_template": ...}`.'
    )


def encode_texts(parts: list[tuple[str, ...]], encoder: Encoder) -> list[list[list[int]]]:
    """For each record the ids of the prompt, and of the prompt with each completion."""
    texts = [
        text
        for prompt, *completions in parts
        for text in (prompt, *(prompt + _ended(c, encoder.eos_text) for c in completions))
    ]
    ids = iter(encode_all(encoder.tokenizer, texts))
    encoded = [[next(ids) for _ in part] for part in parts]
    if encoder.eos_id is None:
        return encoded
    return [[prompt, *([*c, encoder.eos_id] for c in full)] for prompt, *full in encoded]


def _ended(completion: str, eos: str) -> str:
    return completion if completion.endswith(eos) else completion + eos


def render(
    record: dict[str, Any], part: tuple[list, ...], encoder: Encoder, number: int
) -> list[list[int]]:
    """The ids of the prompt, ready for an answer, and of each whole conversation."""
    prompt, *completions = part
    own = record.get("chat_template_kwargs", {})
    tools = record.get("tools", encoder.template.get("tools"))
    tools = json.loads(tools) if isinstance(tools, str) else tools
    arguments = {**encoder.template, **own, "tools": tools, "tokenize": True}
    apply = encoder.tokenizer.apply_chat_template
    try:
        asked = apply(prompt, **(arguments | {"add_generation_prompt": True}))
        answered = [apply(prompt + completion, **arguments) for completion in completions]
    except Exception as error:  # a template raises whatever it likes
        raise ValueError(
            f"Record {number} (from 0) does not go through the chat template: {error}"
        ) from error
    return [as_ids(asked), *map(as_ids, answered)]
