"""Settings of the form `name=value`, such as hyper-parameters, and of the form `module:function`.

The modules that use them check the names. The flags themselves are the fields in `groups/`.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

# A module or a file, and the name of a function in it.
FUNCTION = re.compile(r"(.+):([A-Za-z_]\w*)")


def split_pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """`["a=b"]` as `{"a": "b"}`.

    **Raises:**

    `ValueError` if a text has no `=`, or if a name occurs twice.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise ValueError(f"`{flag}` must be of the form NAME=VALUE; got {text!r}.")
        if name in pairs:
            raise ValueError(f"`{flag}` gives `{name}` twice; keep one of them.")
        pairs[name] = value
    return pairs


def split_columns(texts: Sequence[str]) -> dict[str, str | None]:
    """`--columns` by name, for `data.read`; a column without another name is to be ignored."""
    return {ours: theirs or None for ours, theirs in split_pairs(texts, "--columns").items()}


def as_number(text: str, flag: str) -> float:
    """`text` as a number, else a `ValueError` that names the flag."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"`{flag}` must be a number; got {text!r}.") from None


def near(word: str, known: Iterable[str]) -> str:
    """A question, after a space, that names the known word nearest to `word`; or nothing."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" Did you mean `{matches[0]}`?" if matches else ""


def is_function(text: str) -> bool:
    """Whether a flag names a Python function, as `module:function`, and not a folder."""
    return FUNCTION.fullmatch(text) is not None and not Path(text).exists()


def dtype_of(name: str | None) -> Any:
    """The dtype of this name, if there is one."""
    return None if name is None else jnp.dtype(name)
