"""Answers to prompts, drawn from a policy and cut at their ends.

`prompts.py` reads the prompts.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ... import models, sharding
from ..._arrays.tokens import Tokens
from ..._jax.partitioning import ROWS
from ...data._tokens.tokenizers import special_id
from ...sharding._mesh import size_of
from .texts import decode

MULTIPLE = 16  # the width of prompts is a multiple of it: few widths, few compilations


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer: its text, its number of tokens, and whether it ended by itself."""

    text: str
    tokens: int
    ended: bool


def draw_answers(
    policy: models.Transformer,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int,
    mesh: Mesh | None = None,
    **options: Any,
) -> list[Answer]:
    """An answer to each prompt, `batch_size` at a time.

    **Arguments:**

    - `prompts`: token ids.
    - `tokenizer`: decodes the answers; its EOS and the model's EOS tokens end an answer.
    - `mesh`: the devices that the policy and the prompts are split over, if there are several.
    - `options`: further arguments of `models.generate`.
    """
    ends = ends_of(policy, tokenizer)
    width = width_of(prompts)
    rows = 1 if mesh is None else size_of(mesh, ROWS)
    # Filled up to one shape, so that a single compilation is enough.
    size = -(-min(batch_size, len(prompts)) // rows) * rows
    answers = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        batch = padded(part + [part[0]] * (size - len(part)), width)
        batch = batch if mesh is None else sharding.shard_batch(batch, mesh)
        key = jax.random.fold_in(jax.random.key(seed), start)
        drawn = models.generate(policy, batch, key=key, eos=ends, **options)
        rows = zip(np.asarray(drawn.ids), np.asarray(drawn.mask), part, strict=False)
        answers += [_answer(ids[mask].tolist(), tokenizer, ends) for ids, mask, _ in rows]
    return answers


def ends_of(policy: models.Transformer, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: the EOS of the tokenizer and of the model's files."""
    generation_config = json.loads(policy.origin.files.get("generation_config.json", b"{}"))
    named = [origin.get("eos_token_id") for origin in (policy.origin.config, generation_config)]
    ids = {special_id(tokenizer, "eos")}
    for value in named:
        ids |= set(value) if isinstance(value, list) else {value}
    return tuple(sorted(i for i in ids if type(i) is int and 0 <= i < policy.config.vocab))


def width_of(rows: Sequence[Sequence[int]]) -> int:
    """The width that holds all rows, a multiple of `MULTIPLE`."""
    return -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE


def padded(rows: Sequence[Sequence[int]], width: int) -> Tokens:
    """Rows of ids, padded on the right."""
    mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]  # (rows, width)
    ids = np.zeros(mask.shape, np.int32)
    # A boolean mask assigns in row-major order, which is the order of the concatenated rows.
    ids[mask] = [token for row in rows for token in row]
    return Tokens(ids, mask)


def _answer(ids: list[int], tokenizer: Any, ends: tuple[int, ...]) -> Answer:
    ended = bool(ids) and ids[-1] in ends
    return Answer(decode(tokenizer, ids[:-1] if ended else ids), len(ids), ended)
