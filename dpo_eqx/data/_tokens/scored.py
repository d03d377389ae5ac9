"""Which tokens of a conversation's answers are scored: all, those of the assistant, its last turn.

`template.py` renders conversations; `rows.py` says how a row holds the choice.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from .encoder import Encoder
from .template import Conversation, encode_rendered, render
from .tokenizers import as_ids, shared_length

SCORES = ("completion", "assistant", "last")


def check_score(score: str, *, tokenized: bool) -> None:
    """Raises `ValueError` if `score` is unknown, or if token ids would need turns."""
    if score not in SCORES:
        choices = ", ".join(f"`{name}`" for name in SCORES)
        raise ValueError(f"`score` must be one of {choices}; got {score!r}.")
    if tokenized and score != "completion":
        raise ValueError(
            f"`score` must be `completion` for records of token ids, which have no turns; got "
            f"{score!r}. Leave it out, or give conversations."
        )


def masks_of(
    conversation: Conversation, encoder: Encoder, ids: Sequence[list[int]]
) -> list[list[bool]] | None:
    """For each whole conversation, whether each of its tokens is scored.

    It is `None` if all tokens behind the prompt are scored. A turn reaches from where the chat
    template begins it to where it begins the next one; of a turn of the assistant, the part behind
    the generation prompt is scored. If the template marks the assistant's words by
    `{% generation %}`, only these are.

    **Arguments:**

    - `ids`: the ids of the prompt with the generation prompt, and of each whole conversation.

    **Raises:**

    `ValueError` that names the record if the template renders turns otherwise if more follow, so
    that their tokens cannot be told apart.
    """
    messages = [message for part in conversation.parts for message in part]
    if encoder.score == "completion" and all(_weighs(message) for message in messages):
        return None
    prompt, *wholes = ids
    return [
        _Whole(conversation, encoder, turns, prompt, whole).mask()
        for turns, whole in zip(conversation.wholes, wholes, strict=True)
    ]


def _weighs(message: Any) -> bool:
    return message.get("weight", 1) != 0


class _Whole:
    """The prompt with one completion: its messages and its ids."""

    def __init__(
        self,
        conversation: Conversation,
        encoder: Encoder,
        messages: Sequence[Any],
        prompt: list[int],
        ids: list[int],
    ):
        self._conversation, self._encoder, self._messages = conversation, encoder, messages
        self._prompt, self._ids = prompt, ids
        self._first = len(conversation.parts[0])
        self._rendered: Any = None

    def mask(self) -> list[bool]:
        turns = range(self._first, len(self._messages))
        if self._encoder.score == "completion":
            # All tokens behind the prompt, without the turns of weight 0.
            left_out = [turn for turn in turns if not _weighs(self._messages[turn])]
            spans = [(self._start(turn), self._start(turn + 1)) for turn in left_out]
            return [not scored for scored in self._in(spans)]
        answers = [turn for turn in turns if self._messages[turn]["role"] == "assistant"]
        chosen = answers if self._encoder.score == "assistant" else answers[-1:]
        chosen = [turn for turn in chosen if _weighs(self._messages[turn])]
        if not self._encoder.marks_answers(self._conversation.arguments):
            return self._in([(self._answer(turn), self._start(turn + 1)) for turn in chosen])
        marked = self._marked()
        if chosen == answers:
            return marked
        among = self._in([(self._start(turn), self._start(turn + 1)) for turn in chosen])
        return [a and b for a, b in zip(marked, among, strict=True)]

    def _in(self, spans: Sequence[tuple[int, int]]) -> list[bool]:
        mask = [False] * len(self._ids)
        for start, end in spans:
            mask[start:end] = [True] * (end - start)
        return mask

    def _start(self, turn: int) -> int:
        """The place of the first token of a turn, or of the end."""
        if turn == self._first:
            return 0  # the prompt is never scored
        return self._length_of(turn)

    def _length_of(self, turn: int) -> int:
        """The number of tokens of the turns before `turn`."""
        if turn == len(self._messages):
            return len(self._ids)
        before = self._render(self._messages[:turn])
        if self._rendered is None:
            self._rendered = self._render(self._messages)
        if self._rendered[: len(before)] != before:
            raise ValueError(
                f"{self._conversation.where}: the chat template renders message {turn - 1} (from 0)"
                f" otherwise if more follow, so the tokens of single turns are not known for "
                f"`score={self._encoder.score!r}` or messages of weight 0. Take a template that "
                "marks answers by `{% generation %}`, or `completion`."
            )
        return shared_length(self._ids_of(before), self._ids)

    def _answer(self, turn: int) -> int:
        """The place of the first token behind the generation prompt of a turn."""
        if turn == self._first:
            asked = self._prompt
        else:
            asked = self._ids_of(self._render(self._messages[:turn], generation=True))
        shared = shared_length(asked, self._ids)
        is_kept = turn == self._first and shared in (len(asked), 0)
        return shared if is_kept else max(self._length_of(turn), shared)

    def _render(self, messages: Sequence[Any], *, generation: bool = False) -> Any:
        try:
            rendered = render(self._conversation, self._encoder, messages, generation=generation)
        except Exception as error:  # a template can raise anything
            raise ValueError(
                f"{self._conversation.where}: the chat template refuses the first {len(messages)} "
                f"messages, so the tokens of single turns are not known: {error}"
            ) from error
        return rendered if isinstance(rendered, str) else as_ids(rendered)

    def _ids_of(self, rendered: Any) -> list[int]:
        return encode_rendered(self._encoder, rendered)

    def _marked(self) -> list[bool]:
        """The tokens that the template marks by `{% generation %}`."""
        arguments = {**self._conversation.arguments, "tokenize": True, "return_dict": True}
        encoded = self._encoder.tokenizer.apply_chat_template(
            self._messages, **arguments, return_assistant_tokens_mask=True
        )
        return [bool(marked) for marked in encoded["assistant_masks"]]


def masks_in_row(
    masks: Sequence[list[bool]] | None, names: Sequence[str], start: int
) -> Iterator[tuple[str, list[bool]]]:
    """The columns of a row for the masks of whole conversations, without those that are all true.

    **Arguments:**

    - `names`: the sides, such as `chosen`.
    - `start`: the place of the first token of the completions.
    """
    for name, mask in zip(names, masks or (), strict=False):
        if not all(mask[start:]):
            yield f"{name}_mask", mask[start:]
