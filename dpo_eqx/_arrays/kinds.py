"""Checks that a batch is one, and of the kind that a score takes.

A batch of a user's own passes if it has the fields that are read. The fields are not checked here.
"""

from typing import Any

from .._jax.describe import described

# The score of each kind of batch, and what its losses are of.
_SCORES = {
    "PreferenceBatch": ("score_pairs", "pairs"),
    "UnpairedBatch": ("score_unpaired", "single completions"),
    "PackedBatch": ("score_packed", "pairs"),
}


def check_is_batch(batch: Any) -> None:
    """Raises `ValueError` if `batch` is something else, such as a dict or a policy."""
    if all(hasattr(batch, name) for name in ("weight", "reference", "per_pair")):
        return
    if callable(batch):
        remedy = "The policy comes first, and the batch after it."
    else:
        remedy = "Make one of arrays by `dpx.PreferenceBatch(...)`, or of rows by `data.batches`."
    raise ValueError(
        "`batch` must be a `dpx.PreferenceBatch`, or a batch of another kind that the score takes; "
        f"got {described(batch)}. {remedy}"
    )


def check_kind(batch: Any, *fields: str, score: str) -> None:
    """Raises `ValueError` if `batch` does not have the fields that the score reads."""
    if all(hasattr(batch, name) for name in fields):
        return
    check_is_batch(batch)
    words = ", ".join(f"`{name}`" for name in fields)
    known = _SCORES.get(type(batch).__name__)
    remedy = (
        ""
        if known is None
        else f" Give `score=dpx.{known[0]}` to the step, with a loss of {known[1]}."
    )
    raise ValueError(
        f"`{score}` takes a batch with the fields {words}; got {described(batch)}.{remedy}"
    )
