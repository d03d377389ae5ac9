"""Splits whole sequences with response masks into a prompt and two completions, on the host.

Only `PreferenceBatch.from_sequences` uses this file.
"""

import numpy as np

from .tokens import Tokens


def split_sequences(chosen: Tokens, rejected: Tokens) -> tuple[Tokens, Tokens, Tokens]:
    """The shared prompt and the two completions of each pair, padded on the right with id 0.

    The prompt is the prefix that both sequences share before the first scored token of either. If
    they differ earlier, the unscored tokens after the prefix go to the completions as context.
    """
    if len(chosen.ids) != len(rejected.ids):
        raise ValueError(
            "`chosen_ids` and `rejected_ids` must have one row per pair; got shapes "
            f"{chosen.ids.shape} and {rejected.ids.shape}."
        )
    rows = zip(chosen.ids, chosen.mask, rejected.ids, rejected.mask, strict=True)
    starts = np.array([_shared_prompt(*row) for row in rows], int)
    if (starts == 0).any():
        raise ValueError(
            "`chosen_ids` and `rejected_ids` must begin with a shared prompt of at least one "
            f"unscored token; got none in row {np.argmin(starts)}."
        )
    ends = _ends(chosen), _ends(rejected)
    width = max(int((end - starts).max(initial=1)) for end in ends)
    prompt = Tokens(chosen.ids, np.ones_like(chosen.mask))
    return (
        _cut(prompt, np.zeros_like(starts), starts, int(starts.max(initial=1))),
        _cut(chosen, starts, ends[0], width),
        _cut(rejected, starts, ends[1], width),
    )


def _shared_prompt(
    chosen_ids: np.ndarray,
    chosen_mask: np.ndarray,
    rejected_ids: np.ndarray,
    rejected_mask: np.ndarray,
) -> int:
    """The number of tokens that both sequences share before the first scored token of either."""
    limit = min(_first_true(chosen_mask), _first_true(rejected_mask))
    differs = chosen_ids[:limit] != rejected_ids[:limit]
    return _first_true(differs)


def _first_true(mask: np.ndarray) -> int:
    return int(np.argmax(mask)) if mask.any() else len(mask)


def _ends(tokens: Tokens) -> np.ndarray:
    """One past the last scored token of each row; 0 if a row has none."""
    width = tokens.mask.shape[1]
    last = width - np.argmax(tokens.mask[:, ::-1], axis=1)
    return np.where(tokens.mask.any(axis=1), last, 0)


def _cut(tokens: Tokens, starts: np.ndarray, ends: np.ndarray, width: int) -> Tokens:
    """The tokens from `starts` to `ends` of each row, padded on the right with id 0 to `width`."""
    source = starts[:, None] + np.arange(width)
    inside = source < ends[:, None]
    source = np.where(inside, source, 0)
    return Tokens(
        np.where(inside, np.take_along_axis(tokens.ids, source, axis=1), 0),
        inside & np.take_along_axis(tokens.mask, source, axis=1),
    )
