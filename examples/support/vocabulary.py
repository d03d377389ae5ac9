"""Text to tokens and back, over a vocabulary of pieces of text: words, or single bytes.

The caller sets the widths. Longer prompts lose their start, and longer completions their end.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import dpo_eqx as dpx


class Pair(NamedTuple):
    """A prompt and two answers to it."""

    prompt: bytes
    chosen: bytes
    rejected: bytes


class Widths(NamedTuple):
    """The numbers of tokens that fit in a row of a prompt and of a completion."""

    prompt: int
    completion: int


class Vocabulary:
    """Pieces of text by id, and a last token `end`, which stands for no text.

    `end` ends every completion and starts every prompt, so that none of them is empty.

    **Arguments:**

    - `pieces`: the pieces, all different.
    - `pattern`: a regular expression whose successive matches in a text are pieces.
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
        """The texts of rows of tokens, without `end`."""
        pieces = [*self.pieces, b""]
        rows = zip(np.asarray(tokens.ids), np.asarray(tokens.mask), strict=True)
        return [b"".join(pieces[token] for token in ids[mask]) for ids, mask in rows]

    def prompts(self, texts: Sequence[bytes], width: int) -> dpx.Tokens:
        """Prompts as rows of tokens; longer prompts keep their end."""
        return padded([[self.end, *self.encode(text)][-width:] for text in texts], width)

    def completions(self, texts: Sequence[bytes], width: int) -> dpx.Tokens:
        """Completions as rows of tokens; longer ones keep their start, and lose `end`."""
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
        """Single completions as a batch, for maximum likelihood."""
        return dpx.UnpairedBatch(
            self.prompts(prompts, widths.prompt),
            self.completions(completions, widths.completion),
            label=np.ones(len(prompts), bool),
        )


# The vocabulary of all bytes. Because of `re.DOTALL`, the pattern also matches a line break.
BYTES = Vocabulary([bytes([byte]) for byte in range(256)], rb".")


def padded(rows: Sequence[Sequence[int]], width: int) -> dpx.Tokens:
    """Rows of ids, padded on the right to arrays of shape `(len(rows), width)`."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(width) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = [token for row in rows for token in row]
    return dpx.Tokens(ids, mask)


def take(batch: Any, rows: np.ndarray | jax.Array) -> Any:
    """The given rows of a batch of either kind, or of tokens."""
    return jax.tree.map(lambda x: x[rows], batch)


def in_chunks(batch: dpx.PreferenceBatch, size: int) -> list[dpx.PreferenceBatch]:
    """A batch in parts of equal size, so that one compilation is enough.

    Rows of weight 0 fill up the last part.
    """
    rows = np.arange(-(-batch.pairs // size) * size)
    weight = (rows < batch.pairs).astype(np.float32)
    filled = dataclasses.replace(take(batch, rows % batch.pairs), weight=weight)
    return [take(filled, part) for part in np.split(rows, len(rows) // size)]


def random_batches(count: int, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """The row numbers of each batch; every epoch has a new random order."""
    rng = np.random.default_rng(seed)
    size = min(size, count)
    epochs = -(-steps * size // count)
    rows = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    return np.split(rows[: steps * size], steps)
