"""Truncation: which end of a row is cut if it is too long, and when the row is dropped.

`report.py` counts and reports.
"""

import dataclasses

from .rows import Row, mask_name


@dataclasses.dataclass(frozen=True)
class Limits:
    """The greatest lengths, in tokens; `None` means unlimited.

    - `max_prompt_length`: applies first; a longer prompt keeps its end.
    - `max_completion_length`: a longer completion keeps its start, and loses its EOS.
    - `max_length`: the limit of prompt and completion together, which keep their start. A row is
        dropped if its prompt alone has this length or more.

    **Raises:**

    `ValueError` if a limit is not a positive integer.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a positive integer or None; got {value!r}.")


def truncate(row: Row, limits: Limits) -> tuple[Row | None, list[str]]:
    """`row` within `limits`, with the reasons for each cut; no row if it must be dropped.

    **Arguments:**

    - `row`: the uncut row, with its EOS.
    - `limits`: lengths in tokens.

    **Returns:**

    `(row, reasons)`: the row, and keys of `report.CUT`; or `None` and one key of
    `report.DROPPED`.
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
    completions = {name: row[name][:room] for name in names}
    masks = {mask_name(n): row[mask_name(n)][:room] for n in names if mask_name(n) in row}
    is_cut = (name for name in names if len(completions[name]) < len(row[name]))
    cut += [name.replace("_ids", "_cut") for name in is_cut]
    return row | {"prompt_ids": prompt} | completions | masks, cut
