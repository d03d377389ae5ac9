"""The forms of preference records, recognised from their columns, and the checks of records.

`read.py` reads the records; `data/_tokens/tokenize.py` makes rows of them.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

FORMS = {
    "token ids": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unpaired token ids": ("prompt_ids", "completion_ids", "label"),
    "explicit prompt": ("prompt", "chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "implicit prompt": ("chosen", "rejected"),
}
NUMBERS = ("weight", "beta", "reference_chosen", "reference_rejected", "reference_completion")
TEMPLATE = ("tools", "chat_template_kwargs")
# TRL's names for precomputed log-probabilities of the reference.
ALIASES = {
    "ref_chosen_logps": "reference_chosen",
    "ref_rejected_logps": "reference_rejected",
    "ref_logps": "reference_completion",
}
KNOWN = {*NUMBERS, *TEMPLATE, *ALIASES, *(name for form in FORMS.values() for name in form)}


@dataclasses.dataclass(frozen=True)
class Form:
    """The columns of the records in one source; `str(form)` lists them in a line.

    **Arguments:**

    - `name`: a key of `FORMS`.
    - `conversational`: whether the completions are lists of messages rather than text.
    - `numbers`: the columns of numbers that every record has, such as `weight`.
    - `ignored`: the columns that nothing uses.
    """

    name: str
    conversational: bool = False
    numbers: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that define the form."""
        return FORMS[self.name]

    @property
    def unpaired(self) -> bool:
        """Whether a record is one completion with a label, rather than a pair."""
        return "label" in self.columns

    @property
    def tokenized(self) -> bool:
        """Whether the records hold token ids already."""
        return "prompt_ids" in self.columns

    def __str__(self):
        kind = "" if self.tokenized else ", conversations" if self.conversational else ", text"
        parts = [f"{self.name}{kind}: {_ticked(self.columns)}"]
        parts += [f"with {_ticked(self.numbers)}"] if self.numbers else []
        parts += [f"not used: {_ticked(self.ignored)}"] if self.ignored else []
        return "; ".join(parts)


def recognise(record: Mapping[str, Any], where: str) -> Form:
    """The form of `record`, whose columns already have our names.

    If the answers are whole conversations and the prompt is text, as in UltraFeedback, the prompt
    is redundant, and the form is an implicit prompt.

    **Raises:**

    `ValueError` if no form matches; the error lists the columns found and the nearest form's.
    """
    # The order of `FORMS` decides: an explicit prompt has the columns of an implicit one, too.
    names = [name for name, columns in FORMS.items() if all(c in record for c in columns)]
    if not names:
        raise ValueError(_no_form(record, where))
    name, columns = names[0], FORMS[names[0]]
    answers = [record[column] for column in columns if column in ("chosen", "completion")]
    conversational = any(isinstance(answer, list) for answer in answers)
    if name == "explicit prompt" and is_redundant(record["prompt"], answers[0]):
        name, columns = "implicit prompt", FORMS["implicit prompt"]
    wanted = set(columns)
    numbers = tuple(column for column in NUMBERS if column in record)
    ignored = tuple(str(c) for c in record if c not in {*wanted, *numbers, *TEMPLATE})
    return Form(name, conversational, numbers, ignored)


def is_redundant(prompt: Any, answer: Any) -> bool:
    """Whether a text prompt repeats the first turn of a conversation that holds the prompt."""
    return isinstance(prompt, str) and isinstance(answer, list)


def _no_form(record: Mapping[str, Any], where: str) -> str:
    nearest = max(FORMS, key=lambda name: sum(c in record for c in FORMS[name]) / len(FORMS[name]))
    missing = [column for column in FORMS[nearest] if column not in record]
    return (
        f"{where} must have the columns of one form. The nearest is `{nearest}`, which needs "
        f"{_ticked(FORMS[nearest])}; missing: {_ticked(missing)}; found: {_ticked(record)}. "
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
                f"{_ticked(record)}."
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
    if all(name in KNOWN for name in columns):
        return columns
    if all(name in KNOWN for name in columns.values()):
        return {ours: name for name, ours in columns.items() if ours is not None}
    unknown = [name for name in columns if name not in KNOWN]
    raise ValueError(
        f"`columns` must map our names to the file's names; {_ticked(unknown)} is not one of our "
        f"names: {_ticked(sorted(KNOWN))}."
    )


def check_record(record: Mapping[str, Any], form: Form, where: str) -> dict[str, Any]:
    """The columns of `record` that `form` uses, with checked values.

    **Raises:**

    `ValueError` that names the column, the record, the requirement and the value.
    """
    for column in (*form.columns, *form.numbers):
        if record.get(column) is None:
            raise ValueError(
                f"`{column}` is missing in {where}, which is read as {form}; found: "
                f"{_ticked(name for name, value in record.items() if value is not None)}."
            )
    for column in NUMBERS:
        # A column that only later records have would be lost silently.
        if column in record and column not in form.numbers and column not in form.ignored:
            raise ValueError(
                f"`{column}` is in {where} but not in the first record. Give it in every record, "
                f'or leave it out: `columns={{"{column}": None}}`.'
            )
    checked = {c: _checker(c, form)(record[c], f"`{c}` in {where}") for c in form.columns}
    checked |= {c: check_number(c, record[c], f"`{c}` in {where}") for c in form.numbers}
    return checked | {c: record[c] for c in TEMPLATE if record.get(c) is not None}


def _checker(column: str, form: Form) -> Callable[[Any, str], Any]:
    if column == "label":
        return check_label
    if form.tokenized:
        return check_ids
    return check_messages if form.conversational else check_text


def check_text(value: Any, what: str) -> str:
    """`value` if it is text that can be encoded, else a `ValueError`."""
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text; got {found(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be text that has a UTF-8 form; character {error.start} is the lone "
            f"surrogate {value[error.start]!r}. Repair or drop the record."
        ) from None
    return value


def check_messages(value: Any, what: str) -> list[dict[str, Any]]:
    """`value` if it is a list of messages with a role and a content, else a `ValueError`.

    Keys with the value `None` are left out: a columnar file adds them if any message has the key.
    """
    if not isinstance(value, list):
        raise ValueError(
            f"{what} must be a list of messages like the other records'; got {found(value)}."
        )
    return [_check_message(message, f"message {i} of {what}") for i, message in enumerate(value)]


def _check_message(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{what} must be a mapping with a `role` of text; got {found(message)}.")
    content = message.get("content")
    if isinstance(content, str):
        check_text(content, f"`content` of {what}")
    elif content is not None and not isinstance(content, list):
        raise ValueError(f"`content` of {what} must be text; got {found(content)}.")
    elif content is None and "tool_calls" not in message:
        raise ValueError(f"{what} must have a `content`; got {found(dict(message))}.")
    return {key: item for key, item in message.items() if item is not None}


def check_ids(value: Any, what: str) -> list[int]:
    """`value` as a list of token ids, else a `ValueError`."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
        raise ValueError(f"{what} must be a list of integers; got {found(value)}.")
    if any(not 0 <= i < 2**31 for i in value):
        worst = next(i for i in value if not 0 <= i < 2**31)
        raise ValueError(f"{what} must hold token ids from 0 to 2**31 - 1; got {worst}.")
    return list(value)


def check_label(value: Any, what: str) -> bool:
    """`value` as a boolean, also from 0 and 1, else a `ValueError`."""
    value = value.item() if hasattr(value, "item") else value
    if type(value) not in (bool, int) or value not in (0, 1):
        raise ValueError(
            f"{what} must be true (a desirable completion) or false; got {found(value)}."
        )
    return bool(value)


def check_number(column: str, value: Any, what: str) -> float:
    """`value` as a finite number in the range of its column, else a `ValueError`."""
    value = value.item() if hasattr(value, "item") else value
    # First a float: an integer of a thousand digits passes comparisons, but converting it raises.
    number = _as_float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a finite number; got {found(value)}.")
    if (column == "weight" and number < 0) or (column == "beta" and not number > 0):
        rule = "not be negative" if column == "weight" else "be positive"
        raise ValueError(f"{what} must {rule}; got {value}.")
    return number


def _as_float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, Real) and type(value) is not bool else math.nan
    except OverflowError:
        return math.inf


def found(value: Any) -> str:
    """A value in words for an error: the beginning of its text, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _ticked(names: Iterable[Any]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"
