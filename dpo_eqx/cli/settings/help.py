"""The flags of a command as `--help` shows them: in groups, each with its text and what it takes.

The flags are the fields of a dataclass, and the text below a field is the flag's text. The groups
are the bases of the dataclass, the last one first.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..._extras import require

# What a flag takes, in place of Python's name of the type.
_TAKES = {str: "TEXT", int: "N", float: "NUMBER", Path: "PATH"}


@functools.cache
def grouped(flags: type) -> type:
    """A dataclass for `tyro.cli` with the fields of `flags` in groups; `ungrouped` undoes it."""
    tyro = require("tyro", extra="train")
    own = _own_fields(flags)
    inherited = {field.name for field in dataclasses.fields(flags) if field.init} - {*own}
    members: list[Any] = [_member(flags, name) for name in own]
    for group in _groups(flags):
        names = [name for name in _ordered(group) if name in inherited]
        if not names:
            continue
        kind = _dataclass(group.__name__, [_member(flags, name) for name in names], group.__doc__)
        title = tyro.conf.arg(name=_title(group))
        # A group may have the title of a flag, so its class names the field.
        members.append((group.__name__, tyro.conf.OmitArgPrefixes[Annotated[kind, title]]))
    return _dataclass(flags.__name__, members, flags.__doc__)


def ungrouped(parsed: Any) -> dict[str, Any]:
    """The value of each field, from an instance of what `grouped` made."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        values |= ungrouped(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


@functools.cache  # parsing the sources for each flag would take a second
def texts_of(flags: type) -> dict[str, str]:
    """The text below each field of a dataclass, or below that of a base, by the field's name."""
    texts: dict[str, str] = {}
    for kind in reversed(flags.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts


def _groups(flags: type) -> Iterator[type]:
    for base in reversed(flags.__bases__):
        if base is not object:
            yield from [base] if _own_fields(base) else _groups(base)


def _title(group: type) -> str:
    return group.__name__.removesuffix("Flags").lower()


def _own_fields(flags: type) -> list[str]:
    """The names of the flags that the class itself declares."""
    wanted = {field.name for field in dataclasses.fields(flags) if field.init}
    return [name for name in inspect.get_annotations(flags) if name in wanted]


def _ordered(group: type) -> list[str]:
    """The flags of a group: its own, and then those of its bases."""
    return [name for kind in group.__mro__[:-1] for name in _own_fields(kind)]


def _member(flags: type, name: str) -> tuple[str, Any, Any]:
    """A field for `dataclasses.make_dataclass`: as in `flags`, with what `--help` says of it."""
    tyro = require("tyro", extra="train")
    field = next(field for field in dataclasses.fields(flags) if field.name == name)
    text = texts_of(flags)[name]
    kind = get_type_hints(flags)[name]
    is_silent = field.default in (None, ()) or "(default: " in text
    argument = tyro.conf.arg(
        help=text, metavar=_takes(kind), help_behavior_hint="" if is_silent else None
    )
    return name, Annotated[kind, argument], dataclasses.field(default=field.default)


def _takes(kind: Any) -> str | None:
    """What a flag of this type takes, as `--help` shows it; `None` for a switch."""
    options = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return _takes(options[0])
    if get_origin(kind) is tuple:
        return f"{_takes(options[0])} ..."
    if get_origin(kind) is Literal:
        return "|".join(options)
    return _TAKES.get(kind)


def _dataclass(name: str, members: list[Any], doc: str | None) -> type:
    made = dataclasses.make_dataclass(name, members, kw_only=True, frozen=True)
    made.__doc__ = doc
    return made
