"""Settings of the form `name=value`: names of columns, hyper-parameters, divergences.

They are texts until here; which names there are is known to those who use them.
"""

from collections.abc import Sequence


def split_pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """`["a=b"]` as `{"a": "b"}`.

    **Raises:**

    `ValueError` where one has no `=`, or a name comes twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise ValueError(f"`{flag}` must be of the form NAME=VALUE, got {text!r}.")
        if name in pairs:
            raise ValueError(f"`{flag}` gives `{name}` twice; keep one of them.")
        pairs[name] = value
    return pairs


def as_number(text: str, flag: str) -> float:
    """The number that `text` is, or a `ValueError` that names the flag."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`{flag}` must be a number, got {text!r}.") from None
