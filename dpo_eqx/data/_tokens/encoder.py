"""A tokenizer with the settings that decide its ids: the EOS, and the chat template.

`tokenize.py` decides where a completion starts in those ids.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from typing import Any

from .._records.records import Form
from .parts import roles_with_parts
from .tokenizers import encode_all, special_id, start_id_of

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A tokenizer with the settings that decide its ids.

    - `eos_text`, `eos_id`: the EOS to add after a completion of text; at most one of them is set.
    - `start_id`: the token that may replace an empty prompt.
    - `template`: keyword arguments for `apply_chat_template`.
    - `score`: which tokens of a conversation's answers are scored: see `scored.py`.
    """

    tokenizer: Any
    eos_text: str = ""
    eos_id: int | None = None
    start_id: int | None = None
    template: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    score: str = "completion"

    @property
    def renders_text(self) -> bool:
        """Whether the chat template gives text, which the tokenizer then turns into ids."""
        return hasattr(self.tokenizer, "get_chat_template") and callable(self.tokenizer)

    def template_text(self, arguments: Mapping[str, Any]) -> str:
        """The text of the chat template with these arguments; empty if it cannot be known."""
        if not self.renders_text:
            return ""
        chosen = {name: arguments.get(name) for name in ("chat_template", "tools")}
        return self.tokenizer.get_chat_template(**chosen)

    def marks_answers(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the chat template marks the words of the assistant."""
        return bool(_GENERATION.search(self.template_text(arguments)))

    def unused_arguments(self, arguments: Mapping[str, Any]) -> list[str]:
        """The arguments that neither the tokenizer nor the chat template reads."""
        others = [name for name in arguments if name not in self._known_arguments]
        text = self.template_text(arguments) if others else ""
        return [name for name in others if not re.search(rf"\b{re.escape(name)}\b", text)]

    @functools.cached_property
    def _known_arguments(self) -> frozenset[str]:
        """The arguments that `apply_chat_template` itself reads; documents are for the template."""
        names = inspect.signature(self.tokenizer.apply_chat_template).parameters
        return frozenset(names) - {"documents"}

    @functools.cached_property
    def roles_with_parts(self) -> frozenset[str]:
        """The roles whose content the chat template takes in parts; it costs a few renderings."""
        return roles_with_parts(self.tokenizer, self.template)


def make_encoder(
    tokenizer: Any, form: Form, append_eos: bool, eos_id: int | None, template: Mapping[str, Any]
) -> Encoder:
    """The encoder for records of `form`. It decides which EOS is added, and how.

    **Raises:**

    `ValueError` if the tokenizer lacks `encode`, the EOS or the chat template that it needs.
    """
    if form.tokenized:
        return Encoder(tokenizer, start_id=start_id_of(tokenizer))
    if not hasattr(tokenizer, "encode"):
        raise ValueError(
            f"`tokenizer` must have `encode(text)`; got {type(tokenizer).__name__}. Take "
            "`load_tokenizer(path)` or `ByteTokenizer()`."
        )
    eos_id = special_id(tokenizer, "eos") if eos_id is None else eos_id
    start = start_id_of(tokenizer)
    start = eos_id if start is None else start
    if form.conversational:
        _check_template(tokenizer, template, form)
        return Encoder(tokenizer, start_id=start, template=template)
    if not append_eos or _adds(tokenizer, "", eos_id):
        return Encoder(tokenizer, start_id=start)
    text = getattr(tokenizer, "eos_token", None)
    # As text, which is what TRL does: so the tokens before the EOS are those of TRL.
    if isinstance(text, str) and text and (eos_id is None or _adds(tokenizer, text, eos_id)):
        return Encoder(tokenizer, eos_text=text, start_id=start)
    if eos_id is None:
        raise ValueError(
            f"`tokenizer` must have an EOS; got {type(tokenizer).__name__}, which names none. Give "
            "`eos_token_id=`, or `append_eos=False` to end completions without an EOS."
        )
    return Encoder(tokenizer, eos_id=eos_id, start_id=start)


def _adds(tokenizer: Any, text: str, eos_id: int | None) -> bool:
    """Whether the ids of a text followed by `text` end with the EOS."""
    return eos_id is not None and encode_all(tokenizer, ["a" + text])[0][-1:] == [eos_id]


def _check_template(tokenizer: Any, template: Mapping[str, Any], form: Form) -> None:
    has = hasattr(tokenizer, "apply_chat_template")
    if has and (getattr(tokenizer, "chat_template", True) or template.get("chat_template")):
        return
    names = ", ".join(f"`{name}`" for name in form.turns)
    # Somebody who has only columns of text would not look for conversations.
    read_as_turns = f" Turns are read from {names}; `prompt` alone would be plain text."
    raise ValueError(
        f"`tokenizer` must have a chat template for conversations; {type(tokenizer).__name__} has "
        "none. Take a tokenizer with a template, set `tokenizer.chat_template`, or give "
        '`template_arguments={"chat_template": ...}`.' + read_as_turns * bool(names)
    )


def encode_texts(parts: list[tuple[str, ...]], encoder: Encoder) -> list[list[list[int]]]:
    """For each record the ids of the prompt, and of the prompt with each completion."""
    texts = [
        text
        for prompt, *completions in parts
        for text in (prompt, *(_ended(prompt, c, encoder.eos_text) for c in completions))
    ]
    ids = iter(encode_all(encoder.tokenizer, texts))
    encoded = [[next(ids) for _ in part] for part in parts]
    if encoder.eos_id is None:
        return encoded
    return [[prompt, *([*c, encoder.eos_id] for c in full)] for prompt, *full in encoded]


def _ended(prompt: str, completion: str, eos: str) -> str:
    """The whole text, which ends with one EOS, also if the EOS begins in the shared prompt."""
    whole = prompt + completion
    return whole if completion and whole.endswith(eos) else whole + eos
