"""Content in parts, `[{"type": "text", "text": ...}]`, for chat templates that take only text.

`_records/values.py` has checked that all parts are text.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .tokenizers import as_ids

# The shortest conversation in which a turn of each role can stand.
_PROBES = {
    "system": ("system", "user"),
    "user": ("user",),
    "assistant": ("user", "assistant"),
    "tool": ("user", "assistant", "tool"),
}


def has_parts(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the content of any message is in parts."""
    return any(isinstance(message.get("content"), list) for message in messages)


def join_parts(
    messages: Sequence[Mapping[str, Any]], roles: Collection[str]
) -> list[Mapping[str, Any]]:
    """`messages` with text in place of parts, except in turns of `roles`."""
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list) and message["role"] not in roles
        else message
        for message in messages
    ]


def roles_with_parts(tokenizer: Any, arguments: Mapping[str, Any]) -> frozenset[str]:
    """The roles whose content the chat template takes in parts.

    **Arguments:**

    - `tokenizer`: a tokenizer with a chat template.
    - `arguments`: further keyword arguments for the template.
    """
    return frozenset(role for role in _PROBES if _takes_parts(tokenizer, arguments, role))


def _takes_parts(tokenizer: Any, arguments: Mapping[str, Any], role: str) -> bool:
    def rendered(content: Any) -> list[int] | None:
        turns = [{"role": r, "content": content if r == role else "q"} for r in _PROBES[role]]
        try:
            return as_ids(tokenizer.apply_chat_template(turns, **{**arguments, "tokenize": True}))
        except Exception:  # a template can raise anything; this one does not take such content
            return None

    text, parts = rendered("a"), rendered([{"type": "text", "text": "a"}])
    # Either parts give what text gives, or the template does not read text at all.
    return parts is not None and (parts == text or text in (None, rendered("b")))
