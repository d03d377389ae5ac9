"""Settings in a YAML file: read with checks that name the line, and written back.

Keys are the flags, with `-` or `_`. `parse.py` reads the flags themselves.
"""

import dataclasses
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..._extras import require
from .options import near
from .settings import INVOCATION, Settings

# PyYAML follows YAML 1.1, in which `1e-6` is text, since it has no decimal point.
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$")


def kinds_of(of: type[Settings]) -> dict[str, Any]:
    """The type of each setting that a file may hold, by name."""
    hints = get_type_hints(of)
    names = [field.name for field in dataclasses.fields(of) if field.init]
    return {name: hints[name] for name in names if name != "config"}


def read_settings(path: Path, of: type[Settings] = Settings) -> dict[str, Any]:
    """The settings in the file, by the names of their fields in the class `of`.

    **Raises:**

    `ValueError` that names file and line, if the file is not YAML, if a key is unknown or given
    twice, or if a value has the wrong type.
    """
    yaml = require("yaml", extra="train")
    loader = _loader(yaml, path)
    try:
        root = loader.get_single_node()
        pairs = [] if root is None else _pairs(yaml, root, path)
        found = [
            (key.value, loader.construct_object(value, deep=True), key) for key, value in pairs
        ]
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    settings: dict[str, Any] = {}
    kinds = kinds_of(of)
    for key, value, node in found:
        where = f"line {node.start_mark.line + 1} of {path}"
        name = _known(key, where, kinds)
        if name in settings:
            raise ValueError(f"`{key}` in {where} is given twice; keep one of them.")
        settings[name] = _checked(value, kinds[name], name, where)
    return settings


def write_settings(settings: Settings, path: Path) -> None:
    """Writes a file that gives the same settings again, if it is used as `--config`."""
    yaml = require("yaml", extra="train")
    values = {
        name.replace("_", "-"): _plain(getattr(settings, name))
        for name in kinds_of(type(settings))
        if name not in INVOCATION
    }
    path.write_text(yaml.dump(values, Dumper=_dumper(yaml), sort_keys=False), encoding="utf-8")


def _loader(yaml: types.ModuleType, path: Path) -> Any:
    class Loader(yaml.SafeLoader):
        """Reads `1e-6` as a number, as YAML 1.2 does."""

    _read_exponents(Loader)
    try:
        return Loader(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"`--config` must be a YAML file; there is no {path}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}.") from None


def _dumper(yaml: types.ModuleType) -> Any:
    class Dumper(yaml.SafeDumper):
        """Writes the text `1e-6` in quotes, since without them it would be read as a number."""

    _read_exponents(Dumper)
    return Dumper


def _read_exponents(resolver: Any) -> None:
    resolver.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def _pairs(yaml: types.ModuleType, root: Any, path: Path) -> list[tuple[Any, Any]]:
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(
            f"{path} must be a mapping of settings to values, such as `beta: 0.1` on each line."
        )
    return root.value


def _known(key: Any, where: str, kinds: dict[str, Any]) -> str:
    """The name of the field for `key`."""
    name = str(key).replace("-", "_")
    if name in kinds:
        return name
    hint = near(name.replace("_", "-"), [kind.replace("_", "-") for kind in kinds])
    raise ValueError(f"`{key}` in {where} is not a setting.{hint} `--help` lists them all.")


def _checked(value: Any, kind: Any, name: str, where: str) -> Any:
    try:
        return _convert(value, kind)
    except TypeError as error:
        raise ValueError(
            f"`{name.replace('_', '-')}` in {where} must be {error}; got {value!r} "
            f"({type(value).__name__})."
        ) from None


def _convert(value: Any, kind: Any) -> Any:
    """`value` as a `kind`. The text of a `TypeError` is what the value must be, in words."""
    options = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        inner = next(option for option in options if option is not types.NoneType)
        return None if value is None else _convert(value, inner)
    if get_origin(kind) is tuple:
        # A key without a value gives nothing, as for the other kinds of settings.
        items = value if isinstance(value, list) else [] if value is None else [value]
        return tuple(_convert(item, options[0]) for item in items)
    if get_origin(kind) is Literal:
        if value not in options:
            words = f"one of {', '.join(map(str, options))}"
            raise TypeError(words)
        return value
    return _scalar(value, kind)


def _scalar(value: Any, kind: type) -> Any:
    accepted, words = {
        bool: (bool, "true or false"),
        int: (int, "an integer"),
        float: (int | float, "a number"),
        str: (str, "text"),
        Path: (str, "a path"),
    }[kind]
    # `True` is an `int` in Python, but not a number in a file.
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(words)
    return kind(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def differences(settings: Settings, values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from a file's `values`, each with the file's and the new value."""
    fields = [field for field in dataclasses.fields(settings) if field.init]
    then = {field.name: field.default for field in fields} | values
    now = {field.name: getattr(settings, field.name) for field in fields}
    return {
        name: (then[name], value)
        for name, value in now.items()
        if name not in INVOCATION and value != then[name]
    }
