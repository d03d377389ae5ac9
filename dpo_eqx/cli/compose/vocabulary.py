"""Checks that two models have one vocabulary, before their weights are read."""

import json
from pathlib import Path
from typing import Any

from ...models._checkpoint.folder import resolve
from .data import vocab_size


def check_one_vocabulary(model: str, other: str, flag: str) -> None:
    """Raises `ValueError` if `model` and `other`, which `flag` gave, differ in their vocabulary.

    Vocabularies differ if their sizes differ, or if a token has another id in the other tokenizer.
    """
    sizes = [vocab_size(path) for path in (model, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"`{flag}` must have the vocabulary of `--model`: {model} has {sizes[0]} tokens, "
            f"{other} has {sizes[1]}. Their distributions cannot be compared; give the model that "
            "training started from."
        )
    tables = [_table(resolve(path)) for path in (model, other)]
    if None not in tables and tables[0] != tables[1]:
        token = sorted(set(tables[0].items()) ^ set(tables[1].items()))[0][0]
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


def _table(folder: Path) -> Any:
    """The ids of all tokens in `tokenizer.json`; `None` if the folder has no such file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokens = tokenizer.get("model", {}).get("vocab")
    # A unigram model lists its tokens in the order of their ids.
    ids = tokens if isinstance(tokens, dict) else {row[0]: i for i, row in enumerate(tokens or [])}
    added = tokenizer.get("added_tokens") or []
    return ids | {token["content"]: token["id"] for token in added}
