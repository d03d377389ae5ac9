"""Checks of a checkpoint before its first tensor is read.

One error lists all problems, each with what was expected and what was found.
"""

import dataclasses
import json
import re
import warnings
from typing import Any

import numpy as np

from .._decoder.companion_files import Origin
from .._decoder.config import Config
from .families import FAMILIES
from .folder import CONFIG, DTYPES, Weights
from .tensor_sources import LeafSource

# Constants that older checkpoints store next to their parameters.
_CONSTANTS = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)h\.\d+\.attn\.(bias|masked_bias|causal_mask)$"
    r"|(^|\.)layers\.\d+\.attention\.(bias|masked_bias)$"
)


def check_tensors(weights: Weights, sources: dict[str, LeafSource], config: Config) -> None:
    """Raises if tensors are missing or extra, or have a wrong shape or an unsupported dtype."""
    family = FAMILIES[config.family]
    expected = {name: source.stored_shape for source in sources.values() for name in source.tensors}
    stored = weights.shapes
    constants = family.constants_of(config)
    extra = {name for name in stored.keys() - expected.keys() if not _CONSTANTS.search(name)}
    extra -= constants.keys()
    if config.tied:
        # `with_tying_of` has checked that it is a copy of the embedding.
        extra.discard(family.names["head"].tensor(0, "weight"))
    problems = [
        f"missing: {name}, of shape {expected[name]}" for name in expected.keys() - stored.keys()
    ]
    problems += [f"extra: {name}, of shape {stored[name]}" for name in extra]
    for name in expected.keys() & stored.keys():
        if stored[name] != expected[name]:
            problems.append(f"mis-shaped: {name} should be {expected[name]}, is {stored[name]}")
        if weights.dtypes[name] not in DTYPES:
            problems.append(f"{name} is of dtype {weights.dtypes[name]}, not of {list(DTYPES)}")
    for name in stored.keys() & constants.keys():
        value = float(weights.read(name).astype(np.float64))
        # Constants in bfloat16 have three digits.
        if abs(value - constants[name]) > 0.01 * abs(constants[name]):
            problems.append(f"{name} is {value}, and only {constants[name]} is supported")
    if problems:
        raise ValueError(
            f"The tensors in {weights.folder} do not match its {CONFIG}. "
            + shorten(sorted(problems))
        )


def with_tying_of(weights: Weights, config: Config) -> Config:
    """The configuration, untied if both embedding and unembedding are stored and differ.

    It then warns. `transformers` does the same.
    """
    names = FAMILIES[config.family].names
    unembedding, embedding = (names[name].tensor(0, "weight") for name in ("head", "embedding"))
    if embedding not in weights.shapes:
        embedding = embedding.split(".", 1)[1]
    if not config.tied or not {unembedding, embedding} <= weights.shapes.keys():
        return config
    if np.array_equal(weights.read(unembedding), weights.read(embedding)):
        return config
    warnings.warn(
        f"`tie_word_embeddings` is true in {weights.folder / CONFIG}, but {unembedding} differs "
        f"from {embedding}. Both are used, as in `transformers`; set it to false to silence this.",
        stacklevel=3,
    )
    return dataclasses.replace(config, tied=False)


def check_tokenizer(origin: Origin, vocab: int) -> None:
    """Raises if the tokenizer has ids outside the vocabulary."""
    if "tokenizer.json" not in origin.files:
        return
    tokens = token_ids(json.loads(origin.files["tokenizer.json"]))
    largest = max(tokens, key=lambda token: tokens[token], default=None)
    if largest is not None and tokens[largest] >= vocab:
        raise ValueError(
            f"`vocab_size` must be above every id of the tokenizer; it is {vocab}, and "
            f"{largest!r} has the id {tokens[largest]}. Resize the embedding, or remove the token."
        )


def token_ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """The id of each token, from the content of a `tokenizer.json`."""
    table = tokenizer.get("model", {}).get("vocab")
    # A unigram model lists its tokens in the order of their ids.
    ids = table if isinstance(table, dict) else {row[0]: i for i, row in enumerate(table or [])}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}


def shorten(problems: list[str], limit: int = 12) -> str:
    """The first `limit` problems in one line, and the number of further ones."""
    remainder = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + remainder + "."
