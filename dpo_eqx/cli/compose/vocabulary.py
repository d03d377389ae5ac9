"""Checks that two models have one vocabulary, before their weights are read."""

import json
from pathlib import Path

from ...models._checkpoint.checks import token_ids
from ...models._checkpoint.folder import resolve
from .data import vocab_size


def check_one_vocabulary(model: str, other: str | None, flag: str) -> None:
    """Raises `ValueError` if `model` and `other`, which `flag` gave, differ in their vocabulary.

    Vocabularies differ if their sizes differ, or if a token has another id in the other tokenizer.
    `None`, the value of a flag that was not given, passes.
    """
    if other is None:
        return
    sizes = [vocab_size(model), vocab_size(other, flag)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`{flag}` must have the vocabulary of `--model`: {model} has {sizes[0]} tokens, "
            f"{other} has {sizes[1]}. Their distributions cannot be compared; give the model that "
            "training started from."
        )
    ours, theirs = (_table(resolve(path)) for path in (model, other))
    if ours is not None and theirs is not None and ours != theirs:
        token = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
        raise ValueError(
            f"`{flag}` must have the vocabulary of `--model`: their tokenizers differ, for "
            f"instance in {token!r}. Give the model that training started from."
        )


def has_tokenizer(model: str) -> bool:
    """Whether the folder of the model has the files of a tokenizer."""
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    )
    return any((resolve(model) / name).is_file() for name in names)


def _table(folder: Path) -> dict[str, int] | None:
    """The ids of all tokens in `tokenizer.json`; `None` if the folder has no such file."""
    path = folder / "tokenizer.json"
    return token_ids(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
