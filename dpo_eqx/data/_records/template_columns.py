"""The columns for the chat template: `tools` and `chat_template_kwargs`, also as JSON text.

`records.py` checks the other columns.
"""

import json
from collections.abc import Mapping
from typing import Any

from .nulls import without_nulls, without_nulls_in_tools
from .values import found


def check_for_template(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The columns that `record` has for the chat template, as values.

    **Raises:**

    `ValueError` with the place if a column is not what it must be.
    """
    tools = _parsed(record.get("tools"), f"`tools` in {where}")
    arguments = _parsed(record.get("chat_template_kwargs"), f"`chat_template_kwargs` in {where}")
    if tools is not None and not _is_list_of_mappings(tools):
        raise ValueError(
            f"`tools` in {where} must be a list of tools, each with its name and parameters by "
            f"name; got {found(tools)}."
        )
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(
            f"`chat_template_kwargs` in {where} must be arguments by name, such as "
            f'`{{"enable_thinking": false}}`; got {found(arguments)}.'
        )
    checked = {} if tools is None else {"tools": without_nulls_in_tools(tools)}
    checked |= {} if arguments is None else {"chat_template_kwargs": without_nulls(arguments)}
    return checked


def _is_list_of_mappings(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def _parsed(value: Any, what: str) -> Any:
    """A value that may be JSON text; empty text is nothing."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        near = error.doc[error.pos : error.pos + 20]
        raise ValueError(
            f"{what} must be JSON if it is text; character {error.pos + 1} of it: {error.msg}; "
            f"found {near!r}."
            if near
            else f"{what} must be JSON if it is text, and it ends early."
        ) from None
