"""Settings from the command line and from YAML: flags override the file, the file the defaults.

`settings.py` defines the settings; `check.py` checks them.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..._extras import require
from .help import grouped, ungrouped
from .settings import Settings
from .yaml_file import read_settings

Kind = TypeVar("Kind", bound=Settings)


def parse(
    arguments: Sequence[str], of: type[Kind] = Settings, program: str = "dpo-eqx train"
) -> Kind:
    """The settings that the arguments of `dpo-eqx train` ask for, or of a command like it.

    **Arguments:**

    - `of`: the class of the settings; `program`: the name of the command.

    **Raises:**

    `ValueError` if the file given by `--config` does not hold valid settings. `SystemExit` with
    status 2, after a message, if the flags are invalid, and with status 0 after `--help`.
    """
    tyro = require("tyro", extra="train")
    config = _config_in(arguments, program)
    # The flags come last, since the later of two flags counts.
    from_file = [] if config is None else flags_of(read_settings(config, of))
    words = [*from_file, *_joined("eval-data", _joined("data", arguments))]
    return of(**ungrouped(tyro.cli(grouped(of), args=words, prog=program)))


def _joined(name: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with the values of all flags `name` behind one: of two, only one counts."""
    flag = f"--{name}"
    others, values, is_value = [], [], False
    for word in arguments:
        is_value = is_value and not word.startswith("-")
        given, equals, value = word.partition("=")
        if is_value:
            values.append(word)
        elif given.replace("_", "-") != flag:
            others.append(word)
        elif equals:
            values.append(value)
        else:
            is_value = True
    return [*others, *_words(name, tuple(values))] if values else list(arguments)


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """The flags that give these settings, which have the names of fields."""
    return [word for name, value in settings.items() for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple) and len(value) != 1:
        return [f"--{flag}", *map(str, value)]
    # With `=`, a value may begin with a dash.
    return [f"--{flag}={value[0] if isinstance(value, tuple) else value}"]


def _config_in(arguments: Sequence[str], program: str) -> Path | None:
    """The value of `--config`, before the other flags are parsed."""
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    return parser.parse_known_args(list(arguments))[0].config
