"""Writes the page of the command's flags, from the dataclasses that its parser is made of.

    python docs/scripts/flags.py

A test compares the page with the parser. The meaning of the flags is not here: each text is the one
that `--help` shows.
"""

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from dpo_eqx.cli._main import COMMANDS
from dpo_eqx.cli.commands.evaluate import Evaluate
from dpo_eqx.cli.commands.generate import Generate
from dpo_eqx.cli.commands.inspect import Inspect
from dpo_eqx.cli.commands.label import Label
from dpo_eqx.cli.commands.plan import PlanFlags
from dpo_eqx.cli.commands.report import Report
from dpo_eqx.cli.commands.sample import Sample
from dpo_eqx.cli.settings.help import grouped
from dpo_eqx.cli.settings.online import Online
from dpo_eqx.cli.settings.settings import Settings

PAGE = Path(__file__).parents[1] / "reference" / "flags.md"
FLAGS: dict[str, type] = {
    "train": Settings,
    "evaluate": Evaluate,
    "generate": Generate,
    "sample": Sample,
    "label": Label,
    "online": Online,
    "report": Report,
    "plan": PlanFlags,
    "inspect": Inspect,
}
POSITIONAL = {"report"}  # what it requires is given without a flag
INTRODUCTION = """# The command's flags

This page lists every flag of every command, as `dpo-eqx COMMAND --help` does, from the same texts.
[From text to a trained checkpoint](../train.md) explains what they do, and which go together.

- A flag may be written with `-` or `_`.
- A flag that takes several values takes them after one another: `--loss sigmoid sft`.
- A switch `--name` is switched off by `--no-name`.
- `train` and `online` also read flags from a YAML file, with `--config`.
- A flag without a default in the table has none, or its text says what happens without it.
"""


def page() -> str:
    """The page, as Markdown."""
    parts = [INTRODUCTION]
    for name, (_, words) in COMMANDS.items():
        parts.append(f"\n## `dpo-eqx {name}`\n\n{words[0].upper()}{words[1:]}.\n")
        made = grouped(FLAGS[name])
        own = list(members(made, groups=False))
        if own:
            parts.append(table(own, is_positional=name in POSITIONAL))
        for field, kind, _ in members(made, groups=True):
            title = field.name.removesuffix("Flags").lower()
            parts.append(f"\n### `{name}`: {title}\n")
            doc = inspect.getdoc(kind)
            if doc:
                parts.append(f"\n{' '.join(doc.split())}\n")
            parts.append(table(list(members(kind, groups=False)), is_positional=False))
    return "".join(parts)


def members(made: type, *, groups: bool) -> Iterator[tuple[dataclasses.Field, Any, Any]]:
    """The groups of flags, or the other fields: each field, its type and what `--help` says."""
    hints = get_type_hints(made, include_extras=True)
    for field in dataclasses.fields(made):
        annotated = hints[field.name]
        if dataclasses.is_dataclass(annotated.__origin__) == groups:
            yield field, annotated.__origin__, annotated.__metadata__[-1]


def table(flags: list[tuple[dataclasses.Field, Any, Any]], *, is_positional: bool) -> str:
    """A table of some flags."""
    lines = ["", "| flag | takes | default | |", "|---|---|---|---|"]
    for field, _, told in flags:
        name = f"--{field.name.replace('_', '-')}"
        is_required = field.default is dataclasses.MISSING
        if is_positional and is_required:
            name = field.name.upper()
        takes = f"`{told.metavar}`".replace("|", "\\|") if told.metavar else ""
        default = "required" if is_required else shown(field.default)
        text = " ".join(told.help.split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {takes} | {default} | {text} |")
    return "\n".join(lines) + "\n"


def shown(default: Any) -> str:
    """A default as it would be given to the flag; empty if there is none."""
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return f"`{' '.join(map(str, default))}`"
    return f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
