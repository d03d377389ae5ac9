"""Nulls that a column schema added: Parquet and `datasets` give every record every key.

Nothing here knows about the other columns of a record.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# Keywords of JSON Schema whose null is a value of its own.
_NULLABLE = ("default", "const")
# Keywords whose value is data, not a schema.
_DATA = (*_NULLABLE, "enum", "examples")
# Keywords whose keys are names that the author of a tool chose, such as a parameter `default`.
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def without_nulls(value: Any) -> Any:
    """`value` without the keys whose value is null, at every depth.

    The members of a list stay, since a column schema adds none. A key with null in JSON Lines goes,
    too: `Dataset.to_json` writes the added nulls, and the same rows must give the same ids from
    every kind of file. TRL does the same.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def without_nulls_in_tools(value: Any) -> Any:
    """The same for tools, where `"default": null` and `"const": null` of a JSON schema stay."""
    if isinstance(value, list | tuple):
        return [without_nulls_in_tools(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    kept = {k: item for k, item in value.items() if item is not None or k in _NULLABLE}
    return {key: _of_keyword(key, item) for key, item in kept.items()}


def _of_keyword(keyword: str, value: Any) -> Any:
    if keyword in _DATA:
        return without_nulls(value)
    if keyword in _NAMED and isinstance(value, Mapping):
        named = {name: item for name, item in value.items() if item is not None}
        return {name: without_nulls_in_tools(item) for name, item in named.items()}
    return without_nulls_in_tools(value)


class AddedDefaults:
    """Finds the nulls under `default` and `const` that a column schema added to tools.

    If a column has a type for `default`, then some tool has a value there, and a null was probably
    added to the tools without one. It stays if the tool's schema admits null. A column of nothing
    but nulls exists only because somebody wrote `"default": null`, so those stay.

    **Arguments:**

    - `schema`: the fields of an Arrow schema; none for a source without a schema.
    """

    def __init__(self, schema: Iterable[Any]):
        # Most files have no such field, and then no record is looked at.
        self._types = {
            field.name: field.type
            for field in schema
            if any(f"{keyword}: " in str(field.type) for keyword in _NULLABLE)
        }

    def removed(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """`record` without the added nulls."""
        if not self._types:
            return record
        types = self._types
        return {k: _removed(v, types[k]) if k in types else v for k, v in record.items()}


def _removed(value: Any, kind: Any) -> Any:
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_removed(item, kind.value_type) for item in value]
    if not isinstance(value, Mapping) or not hasattr(kind, "fields"):
        return value
    types = {field.name: field.type for field in kind.fields}
    added = {
        keyword
        for keyword in _NULLABLE
        if keyword in types
        and value.get(keyword) is None
        and str(types[keyword]) != "null"
        and not _admits_null(value)
    }
    return {k: _removed(v, types.get(k)) for k, v in value.items() if k not in added}


def _admits_null(schema: Mapping[str, Any]) -> bool:
    """Whether a JSON schema allows the value null."""
    kind, enum = schema.get("type"), schema.get("enum")
    choices = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    return bool(
        kind == "null"
        or (isinstance(kind, list) and "null" in kind)
        or (isinstance(enum, list) and None in enum)
        or schema.get("nullable")
        or any(isinstance(choice, Mapping) and _admits_null(choice) for choice in choices)
    )
