"""Tokenizers: the built-in one of bytes, those of `transformers`, and anything with `encode`.

What is tokenised, and where a completion starts, is `tokenize.py`.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..extras import require
from .fingerprint import digest


@runtime_checkable
class Tokenizer(Protocol):
    """What a tokenizer must offer: `encode`, adding the special tokens that it adds.

    It may also have `eos_token` and `eos_token_id`, `bos_token` and `bos_token_id`, and for
    conversations `apply_chat_template(messages, *, tools, add_generation_prompt, ...)`, which
    returns ids.
    """

    def encode(self, text: str) -> Any:
        """The ids of `text`: a list, or an object with `ids`."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, `eos_token_id` 256, and `bos_token_id` 257 before each text.

    For tests and small policies: it needs no file, and no text is out of its vocabulary.
    """

    vocab_size = 258
    eos_token_id = 256
    bos_token_id = 257

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, after the BOS."""
        return [self.bos_token_id, *text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without EOS and BOS."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def __repr__(self):
        return "ByteTokenizer()"


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer in a local folder, or of a name of the hub, by `transformers.AutoTokenizer`.

    No code that comes with the tokenizer is run, and the notice that PyTorch is missing is not
    printed: a tokenizer does not need it.

    **Arguments:**

    - `path`: a folder with `tokenizer.json` or the like, or `owner/name`.

    **Raises:**

    `ImportError` that names the extra; `ValueError` where no tokenizer can be loaded from `path`.
    """
    with _no_notice():
        transformers = require("transformers", extra="hf")
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # `transformers` raises many kinds
        raise ValueError(f"`path` must hold a tokenizer; {path} does not load: {error}") from error


@contextlib.contextmanager
def _no_notice() -> Iterator[None]:
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def encode_all(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, with a tokenizer of `transformers` all at once, which is faster.

    A text that begins with the BOS that the tokenizer adds by itself has it once.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        # Not verbose: lengths beyond the model's are our business, see `truncate.py`.
        encoded = tokenizer(list(texts), verbose=False)["input_ids"]  # pyright: ignore[reportCallIssue]: a tokenizer of `transformers`
    else:
        encoded = [tokenizer.encode(text) for text in texts]
    bos = special_id(tokenizer, "bos")
    return [_once(as_ids(ids), bos) for ids in encoded]


def _once(ids: list[int], bos: int | None) -> list[int]:
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def as_ids(encoded: Any) -> list[int]:
    """The ids in what some tokenizer returned: a list, an array, a mapping, an encoding.

    **Raises:**

    `ValueError` where there are none.
    """
    if isinstance(encoded, Mapping):
        encoded = encoded["input_ids"]
    encoded = getattr(encoded, "ids", encoded)
    ids = [getattr(i, "item", lambda i=i: i)() for i in encoded]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"`tokenizer.encode` must return token ids, got {ids[:5]}.")
    return ids


def special_id(tokenizer: Any, kind: str) -> int | None:
    """The id of the `"bos"` or `"eos"`, under the names that tokenizers have for it."""
    for name in (f"{kind}_token_id", f"{kind}_id", "eot_token" if kind == "eos" else ""):
        value = getattr(tokenizer, name, None)
        value = value() if callable(value) else value
        if type(value) is int and value >= 0:
            return value
    return None


def fingerprint_of(tokenizer: Any) -> str | None:
    """A digest of all that decides the tokenizer's ids; `None` where it cannot be read."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        template = getattr(tokenizer, "chat_template", None)
        specials = getattr(tokenizer, "special_tokens_map", None)
        return digest(backend.to_str(), template, {k: str(v) for k, v in (specials or {}).items()})
    if tokenizer is None or type(tokenizer) is ByteTokenizer:  # a subclass may encode otherwise
        return digest(repr(tokenizer))
    return None
