"""Which end of a row is cut where it is too long, and when it is dropped.

Counting and reporting are in `report.py`.
"""

import dataclasses

from .rows import Row


@dataclasses.dataclass(frozen=True)
class Limits:
    """The greatest lengths, in tokens; `None` is no limit.

    - `max_prompt_length`, applied first: a longer prompt keeps its end.
    - `max_completion_length`: a longer completion keeps its start, and loses its EOS.
    - `max_length`: of prompt and completion together, which keep their start; a row whose prompt
        alone is as long is dropped.

    **Raises:**

    `ValueError` where one is not a positive integer.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a positive integer or None, got {value!r}.")


def truncate(row: Row, limits: Limits) -> tuple[Row | None, list[str]]:
    """`row` within `limits`, and what was done to it; no row where it is to be dropped.

    **Arguments:**

    - `row`: as from the tokenizer, EOS and all.
    - `limits`: lengths in tokens.

    **Returns:**

    The row and reasons: keys of `report.DROPPED` (one, and no row) or of `report.CUT`.
    """
    names = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]
    if not all(row[name] for name in names):
        return None, ["no_completion_token"]
    prompt = row["prompt_ids"][-(limits.max_prompt_length or 0) :]
    cut = ["prompt_cut"] if len(prompt) < len(row["prompt_ids"]) else []
    if limits.max_length is not None and len(prompt) >= limits.max_length:
        return None, ["prompt_fills_max_length"]
    rooms = [limits.max_completion_length, limits.max_length and limits.max_length - len(prompt)]
    room = min((r for r in rooms if r is not None), default=None)
    kept = {name: row[name][:room] for name in names}
    cut += [name.replace("_ids", "_cut") for name in names if len(kept[name]) < len(row[name])]
    return row | {"prompt_ids": prompt} | kept, cut
