"""Messages in other forms than `role` and `content`: ShareGPT's, one message alone, JSON text.

`values.py` checks messages in our form.
"""

import json
from collections.abc import Mapping
from typing import Any

# ShareGPT's names of roles, LLaMA-Factory's and OpenAssistant's, in the words of chat templates.
_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_CALL = "function_call"


def is_messages(value: Any) -> bool:
    """Whether `value` is a list of messages, in any form."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or {"from", "value"} <= value.keys())


def is_foreign(value: Any) -> bool:
    """Whether `value` is messages, but not in our form."""
    if isinstance(value, str):
        return is_messages(_from_json(value))
    if isinstance(value, Mapping):
        return _is_message(value)
    return is_messages(value) and any(
        "role" not in m or (isinstance(m["role"], str) and m["role"] in (*_ROLES, _CALL))
        for m in value
    )


def as_messages(value: Any) -> Any:
    """Messages in our form, or `value` itself if it holds none."""
    value = _from_json(value) if isinstance(value, str) else value
    if _is_message(value):
        return [_message(value)]
    return [_message(message) for message in value] if is_messages(value) else value


def _from_json(text: str) -> Any:
    """The messages that a text holds as JSON, else the text."""
    if not text.startswith(("[{", "{")):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if is_messages(value) or _is_message(value) else text


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role = message["role"] if message.get("role") is not None else message.get("from")
    content = message["content"] if "content" in message else message.get("value")
    rest = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value")}
    if role == _CALL:
        return rest | _call(content)
    turn = {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
    return turn | rest


def _call(content: Any) -> dict[str, Any]:
    """The turn in which the assistant calls a tool, from JSON text with a name and arguments."""
    try:
        call = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        call = None
    if not isinstance(call, Mapping) or "name" not in call:
        return {"role": "assistant", "content": content}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": dict(call)}]}


def from_json_list(value: Any) -> list[Any] | None:
    """The texts of a list, which may be JSON text; `None` for other values."""
    value = listed(value)
    if not isinstance(value, list) or not value:
        return None
    return value if all(item is None or isinstance(item, str) for item in value) else None


def listed(value: Any) -> Any:
    """The list that `value` holds as JSON text, as in a table of text; else `value` itself."""
    if not isinstance(value, str) or not value.startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
