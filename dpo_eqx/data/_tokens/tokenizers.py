"""Tokenizers: the built-in `ByteTokenizer`, `transformers` tokenizers, and anything with `encode`.

`tokenize.py` decides which texts are tokenised, and where a completion starts.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..._extras import require
from .._fingerprint import digest


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer must have `encode`, which adds the tokenizer's usual special tokens.

    It may also have `eos_token` and `eos_token_id`, `bos_token` and `bos_token_id`. Conversations
    need `apply_chat_template(messages, *, tools, add_generation_prompt, ...)`, which returns ids.
    """

    def encode(self, text: str) -> Any:
        """The ids of `text`: a list, or an object with `ids`."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, `eos_token_id` 256, and `bos_token_id` 257 before each text.

    For tests and small policies: it needs no file, and it can encode every text.
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
    """The tokenizer in a local folder or on the hub, loaded by `transformers.AutoTokenizer`.

    Code that comes with the tokenizer is not run. The notice that PyTorch is missing is not
    printed, since a tokenizer does not need PyTorch.

    **Arguments:**

    - `path`: a folder with the tokenizer's files, such as `tokenizer.json`, or a hub name
        `owner/name`.

    **Raises:**

    `ImportError` that names the extra; `ValueError` if no tokenizer can be loaded from `path`.
    """
    with _no_notice():
        transformers = require("transformers", extra="hf")
    files = _files_in(Path(path))
    if files is not None and not files:
        # For some models `transformers` would make a tokenizer without any token.
        raise ValueError(_without_files(path))
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # `transformers` raises many types of error
        if files == {"tokenizer_config.json"}:
            raise ValueError(_without_files(path)) from error
        raise ValueError(f"`path` must hold a tokenizer; {path} does not load: {error}") from error


def _files_in(folder: Path) -> set[str] | None:
    """The names of files in a folder that may be a tokenizer's; `None` if there is no folder."""
    patterns = ("*token*", "vocab*", "merges.txt", "*.model*", "*.spm", "tekken.json")
    if not folder.is_dir():
        return None
    return {file.name for pattern in patterns for file in folder.glob(pattern)}


def _without_files(path: str | Path) -> str:
    return (
        f"`path` must hold a tokenizer; {path} has no file of one, such as `tokenizer.json`. Give "
        "another folder."
    )


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
    """The ids of each text. A `transformers` tokenizer gets all texts at once, which is faster.

    If a text begins with the BOS, and the tokenizer adds a BOS, only one of the two is kept.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        # Not verbose: it would warn of lengths beyond the model's, which `truncate.py` handles.
        encoded = tokenizer(list(texts), verbose=False)["input_ids"]  # pyright: ignore[reportCallIssue]: a tokenizer of `transformers`
    else:
        encoded = [tokenizer.encode(text) for text in texts]
    bos = special_id(tokenizer, "bos")
    return [_once(as_ids(ids), bos) for ids in encoded]


def without_limits(tokenizer: Any) -> Any:
    """The tokenizer without the truncation and padding that its file may have saved.

    `transformers` switches them off by itself; a `tokenizers.Tokenizer` does not.
    """
    if (
        getattr(tokenizer, "truncation", None) is None
        and getattr(tokenizer, "padding", None) is None
    ):
        return tokenizer
    if not hasattr(tokenizer, "no_truncation") or not hasattr(tokenizer, "to_str"):
        return tokenizer
    copy = type(tokenizer).from_str(tokenizer.to_str())  # the user's own stays as it is
    copy.no_truncation()
    copy.no_padding()
    return copy


def _once(ids: list[int], bos: int | None) -> list[int]:
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def shared_length(one: list[int], other: list[int]) -> int:
    """The number of ids with which both begin."""
    if other[: len(one)] == one:  # the usual case, much faster than the loop
        return len(one)
    return next(i for i, a in enumerate(one) if i >= len(other) or a != other[i])


def as_ids(encoded: Any) -> list[int]:
    """The ids in a tokenizer's result: a list, an array, a mapping or an encoding.

    **Raises:**

    `ValueError` if it does not hold token ids.
    """
    if isinstance(encoded, Mapping):
        encoded = encoded["input_ids"]
    encoded = getattr(encoded, "ids", encoded)
    ids = list(encoded)
    # By sets of types, since a loop over all tokens takes as long as their tokenizer.
    if set(map(type, ids)) - {int}:
        ids = [getattr(i, "item", lambda i=i: i)() for i in ids]
    if set(map(type, ids)) - {int} or min(ids, default=0) < 0:
        raise ValueError(f"`tokenizer.encode` must return token ids; got {ids[:5]}.")
    return ids


def special_id(tokenizer: Any, kind: str) -> int | None:
    """The id of the `"bos"` or `"eos"`, under any of the names that tokenizers use for it."""
    for name in (f"{kind}_token_id", f"{kind}_id", "eot_token" if kind == "eos" else ""):
        value = getattr(tokenizer, name, None)
        value = value() if callable(value) else value
        if type(value) is int and value >= 0:
            return value
    return None


def start_id_of(tokenizer: Any) -> int | None:
    """The id that may replace an empty prompt: the BOS, else the EOS, else `None`."""
    bos = special_id(tokenizer, "bos")
    return special_id(tokenizer, "eos") if bos is None else bos


def fingerprint_of(tokenizer: Any) -> str | None:
    """A digest of all that decides the tokenizer's ids; `None` if it cannot be read."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        template = getattr(tokenizer, "chat_template", None)
        specials = getattr(tokenizer, "special_tokens_map", None)
        return digest(backend.to_str(), template, {k: str(v) for k, v in (specials or {}).items()})
    if tokenizer is None or type(tokenizer) is ByteTokenizer:  # a subclass may encode differently
        return digest(repr(tokenizer))
    return None
