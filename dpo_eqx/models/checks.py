"""What must hold before the first tensor of a checkpoint is read.

All problems are found at once, and named with what was expected and what was found.
"""

import json
import re

import numpy as np

from .folder import CONFIG, DTYPES, Weights
from .origin import Origin
from .sources import LeafSource

# Constants that older checkpoints hold beside their parameters.
_CONSTANTS = re.compile(r"rotary_emb\.inv_freq$|(^|\.)h\.\d+\.attn\.(bias|masked_bias)$")


def check_tensors(weights: Weights, sources: dict[str, LeafSource], tied: bool) -> None:
    """Raises where tensors are missing, extra, of another shape or of a dtype we cannot read."""
    expected = {
        name: source.source.stored_shape(source.shape)
        for source in sources.values()
        for name in source.tensors
    }
    found = weights.shapes
    extra = {name for name in found.keys() - expected.keys() if not _CONSTANTS.search(name)}
    if tied and "lm_head.weight" in extra:
        _check_tied(weights, sources["embedding.weight"].tensors[0])
        extra.remove("lm_head.weight")
    problems = [
        f"missing: {name}, of shape {expected[name]}" for name in expected.keys() - found.keys()
    ]
    problems += [f"extra: {name}, of shape {found[name]}" for name in extra]
    for name in expected.keys() & found.keys():
        if found[name] != expected[name]:
            problems.append(f"mis-shaped: {name} should be {expected[name]}, is {found[name]}")
        if weights.dtypes[name] not in DTYPES:
            problems.append(f"{name} is of dtype {weights.dtypes[name]}, not of {list(DTYPES)}")
    if problems:
        raise ValueError(
            f"The tensors in {weights.folder} are not those that its {CONFIG} asks for. "
            + shorten(sorted(problems))
        )


def _check_tied(weights: Weights, embedding: str) -> None:
    if not np.array_equal(weights.read("lm_head.weight"), weights.read(embedding)):
        raise ValueError(
            f"`tie_word_embeddings` is true in {CONFIG}, but lm_head.weight differs from "
            f"{embedding}. Set it to false there to use both."
        )


def check_tokenizer(origin: Origin, vocab: int) -> None:
    """Raises where the tokenizer has ids that the vocabulary has not."""
    if "tokenizer.json" not in origin.files:
        return
    tokenizer = json.loads(origin.files["tokenizer.json"])
    tokens = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    table = tokenizer.get("model", {}).get("vocab")
    # A unigram model lists its tokens in the order of their ids.
    tokens |= table if isinstance(table, dict) else {row[0]: i for i, row in enumerate(table or [])}
    largest = max(tokens, key=lambda token: tokens[token], default=None)
    if largest is not None and tokens[largest] >= vocab:
        raise ValueError(
            f"`vocab_size` must be above every id of the tokenizer; it is {vocab}, and "
            f"{largest!r} has the id {tokens[largest]}. Resize the embedding, or remove the token."
        )


def shorten(problems: list[str], limit: int = 12) -> str:
    """The first of many problems, and how many more there are."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more + "."
