"""Text to tokens and back, over a vocabulary of pieces of text: words, or single bytes.

Widths are the caller's; what is too long is cut here, prompts at the start, completions at the end.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import dpo_eqx as dpx


class Pair(NamedTuple):
    """One prompt and two answers to it."""

    prompt: bytes
    chosen: bytes
    rejected: bytes


class Widths(NamedTuple):
    """Tokens that a row has room for."""

    prompt: int
    completion: int


class Vocabulary:
    """Pieces of text by id, and one token after them, `end`, that is no text.

    `end` ends a completion, and begins a prompt, so that none is empty.

    **Arguments:**

    - `pieces`: all different.
    - `pattern`: what it finds in a text, one after the other, are pieces.
    """

    def __init__(self, pieces: Sequence[bytes], pattern: bytes):
        self.pieces = list(pieces)
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.pattern = re.compile(pattern, re.DOTALL)
        self.end = len(pieces)
        self.size = len(pieces) + 1

    def encode(self, text: bytes) -> list[int]:
        """The ids of a text, without `end`."""
        return [self.ids[piece] for piece in self.pattern.findall(text)]

    def decode(self, tokens: dpx.Tokens) -> list[bytes]:
        """What rows of tokens say, without `end`."""
        pieces = [*self.pieces, b""]
        rows = zip(np.asarray(tokens.ids), np.asarray(tokens.mask), strict=True)
        return [b"".join(pieces[token] for token in ids[mask]) for ids, mask in rows]

    def prompts(self, texts: Sequence[bytes], width: int) -> dpx.Tokens:
        """Prompts; too long ones keep their end."""
        return padded([[self.end, *self.encode(text)][-width:] for text in texts], width)

    def completions(self, texts: Sequence[bytes], width: int) -> dpx.Tokens:
        """Completions; too long ones keep their start, without an `end`."""
        return padded([[*self.encode(text), self.end][:width] for text in texts], width)

    def pairs(self, pairs: Sequence[Pair], widths: Widths) -> dpx.PreferenceBatch:
        """Pairs as a batch."""
        prompts, chosen, rejected = zip(*pairs, strict=True)
        return dpx.PreferenceBatch(
            self.prompts(prompts, widths.prompt),
            self.completions(chosen, widths.completion),
            self.completions(rejected, widths.completion),
        )

    def texts(
        self, prompts: Sequence[bytes], completions: Sequence[bytes], widths: Widths
    ) -> dpx.UnpairedBatch:
        """Single completions as a batch, to be fitted to."""
        return dpx.UnpairedBatch(
            self.prompts(prompts, widths.prompt),
            self.completions(completions, widths.completion),
            label=np.ones(len(prompts), bool),
        )


# Every text there is; and with DOTALL a byte is whatever there is.
BYTES = Vocabulary([bytes([byte]) for byte in range(256)], rb".")


def padded(rows: Sequence[Sequence[int]], width: int) -> dpx.Tokens:
    """Rows of ids, on the left of arrays of shape `(len(rows), width)`."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(width) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = [token for row in rows for token in row]
    return dpx.Tokens(ids, mask)


def take(batch: Any, rows: np.ndarray) -> Any:
    """Some rows of a batch, of either kind."""
    return jax.tree.map(lambda x: x[rows], batch)


def in_chunks(batch: dpx.PreferenceBatch, size: int) -> list[dpx.PreferenceBatch]:
    """A batch in equal parts, so that one compilation does; the last is filled with weight 0."""
    rows = np.arange(-(-batch.pairs // size) * size)
    weight = (rows < batch.pairs).astype(np.float32)
    filled = dataclasses.replace(take(batch, rows % batch.pairs), weight=weight)
    return [take(filled, part) for part in np.split(rows, len(rows) // size)]


def random_batches(count: int, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each batch, one epoch after the other, each in a new order."""
    rng = np.random.default_rng(seed)
    size = min(size, count)
    epochs = -(-steps * size // count)
    rows = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    return np.split(rows[: steps * size], steps)
