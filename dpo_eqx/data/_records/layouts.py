"""Well-known layouts whose prompt lies outside `prompt`, read as conversations.

`records.py` recognises the other forms; `lost.py` refuses a prompt that nothing recognises.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .lost import holds, prompt_text
from .values import found

ANSWERS = ("chosen", "rejected", "completion")
# Columns whose texts are the user's turn, in this order: Intel/orca_dpo_pairs has `question`,
# LLaMA-Factory has `instruction` and `input`, and distilabel has `input`.
_USER = (("prompt",), ("question",), ("instruction", "input"), ("instruction",), ("input",))
# The dialogue so far, in the Stanford Human Preferences data.
_USER += (("history",),)


def columns_of_turns(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of `record` that are turns of the conversation; none for other records.

    A column is a turn if it is text, or null as in the records without a system turn.

    **Arguments:**

    - `record`: the first record of a source, with our names.
    """
    answers = [record[name] for name in ANSWERS if name in record]
    user = next((names for names in _USER if all(_is_turn(record, n) for n in names)), ())
    system = ("system",) if _is_turn(record, "system") else ()
    text = prompt_text(record)
    if "messages" in record and not answers:
        return () if not system or holds(text, record["system"]) else system
    if not answers or "prompt_ids" in record:
        return ()
    if any(holds(text, record[name]) for name in (*user, *system) if name != "prompt"):
        # The records hold these texts already.
        return ()
    if all(isinstance(answer, str) for answer in answers):
        # A text `prompt` alone is the usual form of text.
        return () if user == ("prompt",) and not system else (*system, *user) if user else ()
    if isinstance(record.get("prompt"), list) or _has_user_turn(answers[0]):
        return system
    return (*system, *user) if user else ()


def _is_turn(record: Mapping[str, Any], name: str) -> bool:
    return name in record and (record[name] is None or isinstance(record[name], str))


def _has_user_turn(answer: Any) -> bool:
    turns = answer if isinstance(answer, list) else []
    return any(isinstance(turn, Mapping) and turn.get("role") == "user" for turn in turns)


def as_conversation(
    record: Mapping[str, Any], columns: Sequence[str], where: str
) -> dict[str, Any]:
    """`record` with messages in place of the texts in `columns`.

    The text of `system` is the first turn, and the other texts, each on its own line, are the
    user's turn. An answer of text is a turn of the assistant. A system turn with which the answers
    begin moves to the front.

    **Raises:**

    `ValueError` if a column is not text, or if the user's turn is empty.
    """
    texts = {name: _text(record.get(name), f"`{name}` in {where}") for name in columns}
    system = [_turn("system", texts.pop("system"))] if texts.get("system") else []
    texts.pop("system", None)
    answers = {name: _answer(record[name]) for name in ANSWERS if record.get(name) is not None}
    rest = {name: value for name, value in record.items() if name not in columns}
    if not answers:
        return rest | {"messages": system + list(record.get("messages") or [])}
    if not texts and isinstance(record.get("prompt"), list):
        return rest | {"prompt": system + record["prompt"]}
    if not texts:
        return rest | {name: system + turns for name, turns in answers.items()}
    user = "\n".join(text for text in texts.values() if text)
    if not user:
        names = " and ".join(f"`{name}`" for name in texts)
        raise ValueError(f"{names} in {where} must hold the user's turn; got no text.")
    lead = _shared_system_turns(list(answers.values()))
    prompt = [*system, *next(iter(answers.values()), [])[:lead], _turn("user", user)]
    return rest | {"prompt": prompt} | {name: turns[lead:] for name, turns in answers.items()}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _answer(value: Any) -> Any:
    return [_turn("assistant", value)] if isinstance(value, str) else value


def _text(value: Any, what: str) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{what} must be text like the other records'; got {found(value)}.")
    return value or ""


def _shared_system_turns(answers: Sequence[Any]) -> int:
    length = 0
    for turns in zip(*answers, strict=False):
        first = turns[0]
        is_system = isinstance(first, Mapping) and first.get("role") == "system"
        if not is_system or any(turn != first for turn in turns):
            break
        length += 1
    return length
