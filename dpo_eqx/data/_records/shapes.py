"""Public layouts of preferences, made into records with our columns.

A shape is found in the first record of a source and holds for all of them. Records that have our
columns already pass unchanged. `layouts.py` makes turns of the texts around a conversation.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from .as_chat import as_chat
from .lost import all_text, holds, texts_of
from .names import ends_with_answer, moved_of, names_of
from .rankings import PAIRS, Ranking, pairs_of, ranking_of
from .turns import as_messages, is_foreign, is_messages
from .values import check_number, found, ticked
from .verdicts import verdict_of

_COLUMNS = ("prompt", "chosen", "rejected", "completion")
# Columns whose messages are the prompt, if there is no `prompt`.
_PROMPTS = ("prompt", "messages", "conversations", "conversation", "context", "history")
_PROMPTS += ("trajectory", "dialogue", "dialog", "input")
# Columns of whole conversations, if there is no other answer.
_CONVERSATIONS = ("messages", "conversations", "conversation", "trajectory", "dialogue", "dialog")
_SCORES = ("score", "reward", "rating")

TIES = ("drop", "half")
EQUAL = "records whose answers are equally good"
NO_SCORE = "records with fewer than two answers that have a score"
NOT_PAIRED = "answers in no pair"
NO_ANSWER = "conversations that do not end with a turn of the assistant"


@dataclasses.dataclass(frozen=True)
class Options:
    """How records become pairs.

    **Arguments:**

    - `pairs`: which answers are paired: see `rankings.pairs_of`.
    - `ties`: `drop` leaves out two answers that are equally good; `half` gives both pairs of them
        the weight 0.5.
    - `offset_from_scores`: whether the difference of scores becomes the column `offset`.
    - `where`: columns of the source and the values that they must have.
    - `as_chat`: whether text becomes turns of a conversation.
    """

    pairs: str = "best-worst"
    ties: str = "drop"
    offset_from_scores: bool = False
    where: tuple[tuple[str, Any], ...] = ()
    as_chat: bool = False

    @property
    def changes_plain(self) -> bool:
        """Whether records that have our columns already are changed."""
        return self.offset_from_scores or self.as_chat


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a record becomes records with our columns; `str(shape)` says it, if there is more to do.

    **Arguments:**

    - `names`: our names and those of the source.
    - `prompt`: the column whose messages are the prompt.
    - `last`: the column for the last turn of the prompt, which is an answer.
    - `ranking`: several answers with scores.
    - `is_foreign`: whether messages have another form than ours.
    - `is_wrapped`: whether an answer of text follows messages, and is a turn of the assistant.
    """

    names: tuple[tuple[str, str], ...] = ()
    prompt: str | None = None
    last: str | None = None
    ranking: Ranking | None = None
    is_foreign: bool = False
    is_wrapped: bool = False

    def __str__(self):
        words = [f"`{ours}` from `{name}`" for ours, name in self.names]
        if self.prompt not in (None, "prompt"):
            words.append(f"`prompt` from `{self.prompt}`")
        if self.last is not None:
            words.append(f"`{self.last}` from its last turn")
        return ", ".join([*words, *([str(self.ranking)] if self.ranking else [])])


PLAIN = Shape()
DEFAULTS = Options()


def shape_of(record: Mapping[str, Any], *, with_answer: bool = True) -> Shape:
    """The shape of a source's records, from its first record.

    **Arguments:**

    - `with_answer`: whether messages without other answers end with an answer, as records to learn
        from do, rather than being a prompt.
    """
    if "prompt_ids" in record:
        return PLAIN
    is_pair = "chosen" in record and "rejected" in record
    is_single = "completion" in record and "label" in record
    ranking = None if is_single else ranking_of(record)
    ranking = ranking if is_pair or is_single else ranking or verdict_of(record)
    names = () if ranking else names_of(record)
    moved = moved_of(record, names)
    conversation = _conversation(moved) if with_answer and not ranking else None
    if conversation is not None:
        is_plain = conversation == "messages" and not is_foreign(moved[conversation])
        return PLAIN if is_plain else Shape((("messages", conversation),), is_foreign=True)
    prompt = _prompt(moved, ranking)
    last = _last(moved, prompt)
    answers = [moved[name] for name in _COLUMNS[1:] if name in moved]
    shape = Shape(
        names,
        prompt,
        last,
        ranking,
        any(is_foreign(moved[name]) for name in (*_COLUMNS, prompt) if name in moved),
        prompt is not None and any(isinstance(a, str) for a in answers),
    )
    # Messages under `prompt` beside answers of messages are our own form.
    is_ours = dataclasses.replace(shape, prompt=None) == PLAIN and prompt in (None, "prompt")
    return PLAIN if is_ours else shape


def _conversation(record: Mapping[str, Any]) -> str | None:
    """The column that holds a whole conversation, if no other column has an answer or a label."""
    if any(record.get(name) is not None for name in (*_COLUMNS[1:], "label")):
        return None
    return next((c for c in _CONVERSATIONS if is_messages(as_messages(record.get(c)))), None)


def _prompt(record: Mapping[str, Any], ranking: Ranking | None) -> str | None:
    """The column whose messages are the prompt."""
    taken = ranking.columns if ranking else ()
    known = all_text(record)
    for column in _PROMPTS:
        value = record.get(column)
        turns = value.get("messages") if isinstance(value, Mapping) else as_messages(value)
        turns = as_messages(value) if turns is None else turns
        if column in taken or not is_messages(turns):
            if column == "prompt" and value is not None and column not in taken:
                return None
            continue
        # A whole conversation may be one of the answers, as in UltraFeedback.
        if column == "prompt" or not all(holds(known, text) for text in texts_of(turns)):
            return column
    return None


def _last(record: Mapping[str, Any], prompt: str | None) -> str | None:
    """The column for the last turn of the prompt, if that turn is an answer."""
    if prompt is None or prompt == "prompt":
        return None
    if not ends_with_answer(record[prompt]):
        return None
    if "rejected" in record and "chosen" not in record:
        return "chosen"
    return "completion" if "label" in record and "completion" not in record else None


def records_of(
    record: Mapping[str, Any],
    shape: Shape,
    options: Options,
    where: str,
    left_out: collections.Counter[str],
) -> Iterator[dict[str, Any]]:
    """The records with our columns that a record makes: one, a pair of several answers, or none.

    **Arguments:**

    - `left_out`: counts the records that make none, by reason.
    """
    moved = _with_prompt(moved_of(record, shape.names), shape, where)
    question = moved.get("question")
    if isinstance(question, Mapping) and isinstance(question.get("full_text"), str):
        moved["question"] = question["full_text"]  # WebGPT
    if shape.ranking is None:
        yield _finished(moved, shape, options, where)
        return
    rest = {name: value for name, value in moved.items() if name not in shape.ranking.columns}
    for pair in _pairs(moved, shape.ranking, options, where, left_out):
        yield _finished(rest | pair, shape, options, where)


def first_of(record: Mapping[str, Any], where: str, *, as_chat: bool = False) -> Mapping[str, Any]:
    """The first record with our columns that a record makes, for its prompt."""
    options = Options(ties="half", as_chat=as_chat)
    shape = shape_of(record, with_answer=False)
    made = records_of(record, shape, options, where, collections.Counter())
    return next(made, record)


def _with_prompt(record: dict[str, Any], shape: Shape, where: str) -> dict[str, Any]:
    if shape.prompt is None:
        return record
    value = record.pop(shape.prompt, None)
    if isinstance(value, Mapping) and "messages" in value:
        # OpenAI's format holds the tools beside the messages.
        record |= {"tools": value["tools"]} if value.get("tools") else {}
        value = value["messages"]
    turns = as_messages(value)
    if not is_messages(turns):
        raise ValueError(
            f"`{shape.prompt}` in {where} must be messages like the other records'; got "
            f"{found(value)}."
        )
    if shape.last is None:
        return record | {"prompt": turns}
    return record | {"prompt": turns[:-1], shape.last: turns[-1:]}


def _pairs(
    record: Mapping[str, Any],
    ranking: Ranking,
    options: Options,
    where: str,
    left_out: collections.Counter[str],
) -> Iterator[dict[str, Any]]:
    answers = [a for a in ranking.answers(record, where) if a.score is not None]
    scores = [a.score for a in answers if a.score is not None]
    pairs = [(i, j, 1.0) for i, j in pairs_of(scores, options.pairs)]
    if options.ties == "half" and len(scores) == 2 and not pairs:
        pairs = [(0, 1, 0.5), (1, 0, 0.5)]
    if not pairs:
        left_out[EQUAL if len(scores) > 1 else NO_SCORE] += 1
    elif unpaired := len(answers) - len({i for pair in pairs for i in pair[:2]}):
        left_out[NOT_PAIRED] += unpaired
    weight = 1.0 if record.get("weight") is None else record["weight"]
    for i, j, share in pairs:
        pair: dict[str, Any] = {"chosen": answers[i].content, "rejected": answers[j].content}
        if options.ties == "half" or "weight" in record:
            pair["weight"] = check_number("weight", weight, f"`weight` in {where}") * share
        if ranking.is_scale and options.offset_from_scores:
            pair["offset"] = scores[i] - scores[j]
        yield pair


def _finished(record: dict[str, Any], shape: Shape, options: Options, where: str) -> dict[str, Any]:
    if shape.is_foreign:
        columns = (*_COLUMNS, "messages")
        record |= {name: as_messages(record[name]) for name in columns if name in record}
    if shape.is_wrapped or (shape.ranking and isinstance(record.get("prompt"), list)):
        record |= {
            name: [{"role": "assistant", "content": record[name]}]
            for name in _COLUMNS[1:]
            if isinstance(record.get(name), str)
        }
    if options.offset_from_scores:
        record |= _offset(record, where)
    return as_chat(record, where) if options.as_chat else record


def _offset(record: Mapping[str, Any], where: str) -> dict[str, float]:
    """The column `offset`, from the scores of both answers."""
    for score in _SCORES:
        for names in _names_of_scores(score):
            if all(record.get(name) is not None for name in names) and "offset" not in record:
                one, other = (check_number(n, record[n], f"`{n}` in {where}") for n in names)
                return {"offset": one - other}
    return {}


def _names_of_scores(score: str) -> Iterator[tuple[str, str]]:
    for between in "_-":
        yield f"{score}{between}chosen", f"{score}{between}rejected"
        yield f"chosen{between}{score}", f"rejected{between}{score}"


def check_options(options: Options) -> None:
    """Raises `ValueError` if an option has an unknown value."""
    known = {"pairs": PAIRS, "ties": TIES}
    for name, choices in known.items():
        value = getattr(options, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {ticked(choices)}; got {value!r}.")
