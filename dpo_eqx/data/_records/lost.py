"""Columns that read like the prompt, and from which no token would come.

`layouts.py` knows the layouts whose prompt has another name; the rest is refused here.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .prompts import split_shared_prompt

# Names under which public data sets keep the prompt or a part of it.
_PROMPT_NAME = re.compile(
    r"prompt|prompts|system|system_prompt|system_message|question|questions|"
    r"instruction|instructions|input|inputs|query|context|history|dialogue|"
    r"dialog|conversation|conversations|messages|problem|post|passage|article|"
    r"document|user|human|user_prompt|user_input",
    re.IGNORECASE,
)
# Names of facts about a record, whose text may be a sentence.
_FACTS = re.compile(
    r"chosen|rejected|id$|source|model|lang|category|task|data_?set|domain|split|subset|score|"
    r"rating|reason|rationale|explanation|feedback|critique|comment|note|preference|annotat|url|"
    r"date|time|author|label|tag|title|licen"
)
_ANSWERS = ("chosen", "rejected", "completion")
_LABEL = re.compile(r"^(system|user|human|assistant|gpt|prompter|bot|ai)\s*:\s*", re.IGNORECASE)


def is_prompt_name(column: str) -> bool:
    """Whether public data sets keep the prompt, or a part of it, under such a name."""
    return bool(_PROMPT_NAME.fullmatch(column))


def check_nothing_lost(record: Mapping[str, Any], unused: Iterable[str], where: str) -> None:
    """Raises `ValueError` if a column in `unused` has the name of a prompt, and its text is lost.

    **Arguments:**

    - `record`: a record with our names, before its unused columns are left out.
    - `unused`: the columns that nothing uses.
    """
    for column in unused:
        if not is_prompt_name(column) or not record.get(column):
            continue
        value = record[column]
        texts = [text for text in texts_of(value) if text.strip()]
        # A whole conversation may repeat an answer, a text only the prompt.
        is_whole = isinstance(value, str) or _without_answers(record)
        known = prompt_text(record) if is_whole else all_text(record)
        if not all(holds(known, text) for text in texts):
            raise ValueError(_lost(column, record, where))


def check_no_sentence_lost(record: Mapping[str, Any], unused: Iterable[str], where: str) -> None:
    """The same for any name, if the answers are texts that share no prompt.

    It is for the first record only: the form of all records depends on it.
    """
    shared = prompt_text(record)
    if len(shared.split()) > 2:
        return
    for column in unused:
        value = record.get(column)
        if not isinstance(value, str) or _FACTS.search(column.lower()):
            continue
        if _is_sentence(value) and not holds(shared, value):
            raise ValueError(_lost(column, record, where))


def _lost(column: str, record: Mapping[str, Any], where: str) -> str:
    is_text = isinstance(record[column], str)
    if "prompt" in record:
        remedy = (
            "Put it into the conversations as a turn of the user"
            if column == "prompt"
            else "If it is part of the prompt, write it into `prompt`"
        )
    elif is_text:
        remedy = f'If it is the prompt, give `columns={{"prompt": "{column}"}}`'
    else:
        remedy = "If it is the prompt, put its messages into `prompt`"
    return (
        f"`{column}` in {where} reads like the prompt, and no token would come from it. {remedy}; "
        f'if nothing is to be learnt from it, leave it out: `columns={{"{column}": None}}`.'
    )


def prompt_text(record: Mapping[str, Any]) -> str:
    """The text of the prompt, in one line: that of `prompt`, or what the answers share."""
    answers = [record.get(name) for name in _ANSWERS]
    if _without_answers(record):
        # A whole conversation or text, beside which a prompt can only repeat it.
        whole = record.get("messages") or record.get("text")
        return _in_one_line(whole or record.get("prompt"))
    prompt, (chosen, rejected, completion) = record.get("prompt"), answers
    is_conversation = any(isinstance(answer, list) for answer in answers)
    if isinstance(prompt, list) or (isinstance(prompt, str) and not is_conversation):
        return _in_one_line(prompt)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _in_one_line(split_shared_prompt(chosen, rejected)[0])
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _in_one_line(split_shared_prompt(chosen, rejected)[0])
    return "" if completion is None else _in_one_line(completion)


def all_text(record: Mapping[str, Any]) -> str:
    """The text of the prompt and of all answers, in one line."""
    return " ".join(_in_one_line(record.get(name)) for name in ("prompt", *_ANSWERS))


def _without_answers(record: Mapping[str, Any]) -> bool:
    return all(record.get(name) is None for name in _ANSWERS)


def _in_one_line(value: Any) -> str:
    texts = [value] if isinstance(value, str) else texts_of(value)
    return " ".join(" ".join(text.split()) for text in texts)


def texts_of(value: Any) -> Iterable[str]:
    """The texts of messages, of parts of their content, and of lists of texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_of([value[key] for key in ("content", "value", "text") if key in value])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def holds(text: str, part: Any) -> bool:
    """Whether `text`, in one line, holds the words of `part`, or all of its lines without roles."""
    if not isinstance(part, str):
        return False
    if _holds_words(text, " ".join(part.split())):
        return bool(part.strip())
    lines = [" ".join(_LABEL.sub("", line.strip()).split()) for line in part.splitlines()]
    return any(lines) and all(_holds_words(text, line) for line in lines)


def _holds_words(text: str, part: str) -> bool:
    start = text.find(part) if part else 0
    while start > -1 and part:
        end = start + len(part)
        # "Hi" is not in "This".
        if not (_is_word(text[start - 1 : start + 1]) or _is_word(text[end - 1 : end + 1])):
            return True
        start = text.find(part, start + 1)
    return not part


def _is_word(pair: str) -> bool:
    return len(pair) == 2 and pair.isascii() and pair.isalnum()


def _is_sentence(text: str) -> bool:
    # Scripts without spaces: a few characters beyond Latin, Greek and Cyrillic say as much.
    return len(text.split()) > 2 or sum(character > "\u2e7f" for character in text) > 3
