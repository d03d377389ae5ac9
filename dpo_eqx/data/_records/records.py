"""The forms of preference records, recognised from their columns, and the checks of records.

`read.py` reads the records; `data/_tokens/tokenize.py` makes rows of them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from .layouts import ANSWERS, as_conversation, columns_of_turns
from .lost import check_no_sentence_lost, check_nothing_lost, is_prompt_name
from .template_columns import check_for_template
from .values import (
    check_ids,
    check_label,
    check_messages,
    check_number,
    check_text,
    ticked,
)

FORMS = {
    "token ids": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unpaired token ids": ("prompt_ids", "completion_ids", "label"),
    "explicit prompt": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "implicit prompt": ("chosen", "rejected"),
    # Completions without a label, from which the supervised loss learns.
    "completion token ids": ("prompt_ids", "completion_ids"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
NUMBERS = (
    "weight",
    "beta",
    "offset",
    "reference_chosen",
    "reference_rejected",
    "reference_completion",
)
TEMPLATE = ("tools", "chat_template_kwargs")
# The columns that tell text from conversations.
_TELLING = ("chosen", "completion", "messages", "text")
# TRL's names for precomputed log-probabilities of the reference.
ALIASES = {
    "ref_chosen_logps": "reference_chosen",
    "ref_rejected_logps": "reference_rejected",
    "ref_logps": "reference_completion",
}
KNOWN = {
    "system",
    *NUMBERS,
    *TEMPLATE,
    *ALIASES,
    *(name for form in FORMS.values() for name in form),
}


@dataclasses.dataclass(frozen=True)
class Form:
    """The columns of the records in one source; `str(form)` lists them in a line.

    **Arguments:**

    - `name`: a key of `FORMS`.
    - `conversational`: whether the completions are lists of messages rather than text.
    - `numbers`: the columns of numbers that every record has, such as `weight`.
    - `ignored`: the columns that nothing uses.
    - `turns`: the columns of text that become turns of the conversation, such as `question`.
    """

    name: str
    conversational: bool = False
    numbers: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that define the form."""
        return FORMS[self.name]

    @property
    def unpaired(self) -> bool:
        """Whether a record is one completion, rather than a pair."""
        return "rejected" not in self.columns and "rejected_ids" not in self.columns

    @property
    def labelled(self) -> bool:
        """Whether a record says if its completion is desirable."""
        return "label" in self.columns

    @property
    def answers(self) -> tuple[str, ...]:
        """The completions that a record of text makes."""
        return ("completion",) if self.unpaired else ("chosen", "rejected")

    @property
    def tokenized(self) -> bool:
        """Whether the records hold token ids already."""
        return "prompt_ids" in self.columns

    @functools.cached_property
    def known(self) -> frozenset[str]:
        """All columns that the first record had."""
        return frozenset((*self.columns, *self.numbers, *self.ignored, *self.turns, *TEMPLATE))

    def __str__(self):
        kind = "" if self.tokenized else ", conversations" if self.conversational else ", text"
        parts = [f"{self.name}{kind}: {ticked(self.columns)}"]
        parts += [f"turns from {ticked(self.turns)}"] if self.turns else []
        parts += [f"with {ticked(self.numbers)}"] if self.numbers else []
        parts += [f"not used: {ticked(self.ignored)}"] if self.ignored else []
        return "; ".join(parts)


def recognise(record: Mapping[str, Any], where: str) -> Form:
    """The form of `record`, whose columns already have our names.

    If the answers are whole conversations and the prompt is text, as in UltraFeedback, the prompt
    is redundant, and the form is an implicit prompt. Columns such as `system` and `question` become
    turns of a conversation: see `layouts.py`.

    **Raises:**

    `ValueError` if no form matches; the error lists the columns found and the nearest form's.
    """
    turns = columns_of_turns(record)
    source, record = record, as_conversation(record, turns, where) if turns else record
    name = form_name(record)
    if name is None:
        raise ValueError(_no_form(source, where))
    answers = [record[column] for column in FORMS[name] if column in _TELLING]
    conversational = any(isinstance(answer, list) for answer in answers)
    if name == "explicit prompt" and is_redundant(record["prompt"], answers[0]):
        name = "implicit prompt"
    numbers = tuple(column for column in NUMBERS if column in record)
    used = {*FORMS[name], *numbers, *(TEMPLATE if conversational else ())}
    ignored = tuple(str(column) for column in record if column not in used)
    if name == "implicit prompt" and not conversational:
        check_no_sentence_lost(record, ignored, where)
    return Form(name, conversational, numbers, ignored, turns)


def form_name(record: Mapping[str, Any]) -> str | None:
    """The first of `FORMS` whose columns `record` has."""
    # Their order decides: an explicit prompt has the columns of an implicit one, too.
    return next((n for n, columns in FORMS.items() if all(c in record for c in columns)), None)


def is_redundant(prompt: Any, answer: Any) -> bool:
    """Whether a text prompt repeats the first turn of a conversation that holds the prompt."""
    return isinstance(prompt, str) and isinstance(answer, list)


def _no_form(record: Mapping[str, Any], where: str) -> str:
    # Without any of their columns, nobody meant token ids, although they come first.
    forms = [n for n in FORMS if not n.endswith("ids") or any(c in record for c in FORMS[n])]
    # A prompt alone is more likely a part of a preference than of a demonstration.
    forms = [n for n in forms if n != "completion" or "completion" in record]
    nearest = max(forms, key=lambda name: sum(c in record for c in FORMS[name]) / len(FORMS[name]))
    missing = [column for column in FORMS[nearest] if column not in record]
    if len(missing) == len(FORMS[nearest]):
        forms = "; ".join(ticked(columns) for columns in FORMS.values())
        return (
            f"{where} must have the columns of one form: {forms}; found: {ticked(record)}. If "
            'columns have other names, give them: `columns={"chosen": "its name"}`.'
        )
    return (
        f"{where} must have the columns of one form. The nearest is `{nearest}`, which needs "
        f"{ticked(FORMS[nearest])}; missing: {ticked(missing)}; found: {ticked(record)}. "
        f'If a column has another name, give it: `columns={{"{missing[0]}": "its name"}}`.'
    )


def rename(record: Mapping[str, Any], columns: Mapping[str, str | None], where: str) -> dict:
    """`record` with our names, by TRL's aliases, then by `columns`, our names to the source's."""
    renamed = {ALIASES.get(name, name): value for name, value in record.items()}
    for ours, name in columns.items():
        if name is None:
            renamed.pop(ours, None)
        elif name not in record:
            raise ValueError(
                f"`columns` maps `{ours}` to `{name}`, which {where} does not have; found: "
                f"{ticked(record)}."
            )
    moved = {name for name in columns.values() if name is not None}
    kept = {name: value for name, value in renamed.items() if name not in moved}
    return kept | {ours: record[name] for ours, name in columns.items() if name is not None}


def check_columns(columns: Mapping[str, str | None] | None) -> dict[str, str | None]:
    """`columns` as a mapping of our names to the source's, from that mapping or its inverse.

    **Raises:**

    `ValueError` if neither all its keys nor all its values are our names.
    """
    columns = dict(columns or {})
    # Any column can be left out, also one that has no name here.
    mapped = {name: other for name, other in columns.items() if other is not None}
    left_out: dict[str, str | None] = {name: None for name in columns if name not in mapped}
    if all(name in KNOWN for name in mapped):
        return mapped | left_out
    if all(name in KNOWN for name in mapped.values()):
        return {ours: name for name, ours in mapped.items()} | left_out
    unknown = [name for name in mapped if name not in KNOWN]
    raise ValueError(
        f"`columns` must map our names to the file's names; {ticked(unknown)} is not one of our "
        f"names: {ticked(sorted(KNOWN))}."
    )


def check_record(record: Mapping[str, Any], form: Form, where: str) -> dict[str, Any]:
    """The columns of `record` that `form` uses, with checked values.

    **Raises:**

    `ValueError` that names the column, the record, the requirement and the value.
    """
    if form.turns:
        record = as_conversation(record, form.turns, where)
    for column in (*form.columns, *form.numbers):
        if column in record and record[column] is None:
            raise ValueError(
                f"`{column}` is null in {where}, which is read as {form} and needs a value there. "
                "Repair this record, or leave it out."
            )
        if column not in record:
            raise ValueError(
                f"`{column}` is missing in {where}, which is read as {form}; found: "
                f"{ticked(name for name, value in record.items() if value is not None)}."
            )
    _check_no_new_column(record, form, where)
    if not form.tokenized:
        new = filter(is_prompt_name, record.keys() - form.known)
        check_nothing_lost(record, (*form.ignored, *new), where)
    checked = {c: _checker(c, form)(record[c], f"`{c}` in {where}") for c in form.columns}
    checked |= {c: check_number(c, record[c], f"`{c}` in {where}") for c in form.numbers}
    if form.conversational and "prompt" in checked:
        checked |= _without_prompt(checked)
    return checked | check_for_template(record, where) if form.conversational else checked


def _without_prompt(record: Mapping[str, Any]) -> dict[str, Any]:
    """The answers without the turns of the prompt, if all of them repeat it."""
    prompt = record["prompt"]
    answers = {name: record[name] for name in ANSWERS if name in record}
    if any(answer[: len(prompt)] != prompt for answer in answers.values()):
        return answers
    return {name: answer[len(prompt) :] for name, answer in answers.items()}


def _check_no_new_column(record: Mapping[str, Any], form: Form, where: str) -> None:
    """Raises `ValueError` if a column starts after the first record: it would be lost."""
    new = (record.keys() - form.known) & KNOWN
    for column in sorted(new, key=lambda name: (name != "prompt", name)):
        if record[column] is not None:
            raise ValueError(
                f"`{column}` is in {where} but not in the first record. Give it in every record, "
                f'or leave it out: `columns={{"{column}": None}}`.'
            )


def _checker(column: str, form: Form) -> Callable[[Any, str], Any]:
    if column == "label":
        return check_label
    if form.tokenized:
        return check_ids
    return check_messages if form.conversational else check_text
