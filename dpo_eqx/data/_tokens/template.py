"""Conversations through the chat template: their ids, and an account of what was not rendered.

`encoder.py` has the settings; `account.py` looks texts up in what was rendered.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .account import Messages, Rendered, pieces_of, tool_texts, unused_keys
from .encoder import Encoder
from .parts import has_parts, join_parts
from .report import Account
from .tokenizers import as_ids

# Arguments of `apply_chat_template` that change how the rendered text is tokenised.
_TOKENISING = frozenset(
    {
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenizer_kwargs",
        "truncation",
    }
)
# The generation prompt may end with the first characters of an answer, such as `<think>`.
_SHARED_WITH_ANSWER = 64


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A record's conversations: the prompt's messages, and those of each completion.

    - `where`: the record's place in words.
    - `names`: the columns of the completions.
    - `parts`: the messages of the prompt, and of each completion.
    - `arguments`: keyword arguments for the chat template, with the tools.
    """

    where: str
    names: tuple[str, ...]
    parts: tuple[list, ...]
    arguments: Mapping[str, Any]

    @property
    def wholes(self) -> list[list]:
        """The messages of the prompt with each completion."""
        prompt, *completions = self.parts
        return [prompt + completion for completion in completions]


def conversation_of(
    record: Mapping[str, Any],
    parts: tuple[list, ...],
    names: tuple[str, ...],
    encoder: Encoder,
    where: str,
) -> Conversation:
    """The conversation of a record, with content in the form that the template takes."""
    if any(map(has_parts, parts)):
        parts = tuple(join_parts(messages, encoder.roles_with_parts) for messages in parts)
    arguments = {**encoder.template, **record.get("chat_template_kwargs", {})}
    arguments["tools"] = record.get("tools", encoder.template.get("tools"))
    return Conversation(where, names, parts, arguments)


def encode_conversations(
    conversations: Sequence[Conversation], encoder: Encoder
) -> Iterator[tuple[list[list[int]] | None, Account]]:
    """For each conversation its ids, and what was not rendered by reason.

    The ids are those of the prompt with the generation prompt, and of each whole conversation;
    `None` if the template refuses the conversation.
    """
    rendered = [_rendered(conversation, encoder) for conversation in conversations]
    # One call for all texts: a fast tokenizer uses its threads.
    texts = [text for texts in rendered if isinstance(texts, list) for text in texts]
    ids = iter(_encode(encoder.tokenizer, [text for text in texts if isinstance(text, str)]))
    for conversation, texts in zip(conversations, rendered, strict=True):
        if isinstance(texts, str):
            yield None, {"template_refused": f"{conversation.where}: {texts}"}
        elif isinstance(texts[0], str):
            # The first example of each reason.
            account = dict(reversed(list(_account(conversation, texts, encoder))))
            yield [as_ids(next(ids)) for _ in texts], account
        else:
            yield [as_ids(encoded) for encoded in texts], {}


def prompt_ids(conversation: Conversation, encoder: Encoder) -> list[int]:
    """The ids of the prompt with the generation prompt.

    **Raises:**

    `ValueError` with the place if the template refuses the prompt.
    """
    try:
        rendered = render(conversation, encoder, conversation.parts[0], generation=True)
    except Exception as error:  # a template can raise anything
        raise ValueError(
            f"{conversation.where} does not go through the chat template: {error}"
        ) from error
    return encode_rendered(encoder, rendered)


def encode_rendered(encoder: Encoder, rendered: Any) -> list[int]:
    """The ids of what `render` returned."""
    if isinstance(rendered, str):
        return _encode(encoder.tokenizer, [rendered])[0]
    return as_ids(rendered)


def _rendered(conversation: Conversation, encoder: Encoder) -> list[Any] | str:
    """The text, or the ids, of the prompt and of each whole; one error message if it is refused."""
    try:
        return [
            render(conversation, encoder, conversation.parts[0], generation=True),
            *(render(conversation, encoder, whole) for whole in conversation.wholes),
        ]
    except Exception as error:  # a template can raise anything
        return str(error) or type(error).__name__


def render(
    conversation: Conversation, encoder: Encoder, messages: Messages, *, generation: bool = False
) -> Any:
    """The text, or the ids, of messages of a conversation, perhaps with the generation prompt."""
    arguments = dict(conversation.arguments)
    if generation:
        arguments["add_generation_prompt"] = True
    # Text, so that it is known what was rendered. Tokenising it gives the ids that the template
    # would give, unless its arguments say otherwise.
    as_text = encoder.renders_text and _TOKENISING.isdisjoint(arguments)
    return encoder.tokenizer.apply_chat_template(messages, **{**arguments, "tokenize": not as_text})


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _account(
    conversation: Conversation, texts: list[str], encoder: Encoder
) -> Iterator[tuple[str, str]]:
    """The reasons to report a conversation, each with an example in words."""
    prompt, *wholes = texts
    where = conversation.where
    if not all(whole.startswith(prompt) for whole in wholes):
        yield "prompt_not_kept", where
    first = Rendered(wholes[0])
    yield from _lost(conversation.parts[0], first, "prompt_text_lost", f"{where}, the prompt")
    if lost := [text for text in tool_texts(conversation.arguments["tools"]) if first.lost(text)]:
        yield "tools_lost", f"{where}: {_quoted(lost[0])}"
    answers = zip(conversation.names, conversation.parts[1:], wholes, strict=True)
    for name, messages, whole in answers:
        answer = Rendered(whole[_start_of_answer(prompt, whole) :])
        yield from _lost(messages, answer, "answer_text_lost", f"{where}, `{name}`")
    keys = sorted(unused_keys(list(itertools.chain(*conversation.parts)), first))
    if keys:
        yield "message_keys_unused", f"{where}: {', '.join(f'`{key}`' for key in keys)}"
    if unused := encoder.unused_arguments(conversation.arguments):
        yield "template_arguments_unused", f"{where}: {', '.join(f'`{name}`' for name in unused)}"


def _lost(
    messages: Messages, rendered: Rendered, reason: str, where: str
) -> Iterator[tuple[str, str]]:
    """Each lost text under `reason`; an answer of which nothing is left, or that is empty."""
    pieces = list(pieces_of(messages))
    lost = [(piece, parts) for piece in pieces if (parts := rendered.lost(piece.text))]
    for piece, parts in lost[:1]:
        yield reason, f"{where}, message {piece.message}, `{piece.key}`: {_quoted(parts[0])}"
    if reason != "answer_text_lost":
        return
    if not pieces and messages:
        yield "empty_completion", where
    if pieces and all(rendered.is_gone(piece.text) for piece in pieces):
        yield "answer_not_rendered", where


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _start_of_answer(prompt: str, whole: str) -> int:
    if whole.startswith(prompt):
        return len(prompt)
    # The number of lengths at which the two begin alike: they do up to one length only.
    lengths = range(1, len(prompt) + 1)
    shared = bisect.bisect_left(lengths, True, key=lambda n: not whole.startswith(prompt[:n]))
    earliest = max(shared - _SHARED_WITH_ANSWER, 0)
    return max(whole.rfind("\n", earliest, shared) + 1, earliest)
