"""A table of answers to some prompts, beside those of the reference, for a terminal or a pipe.

`run/samples.py` draws the answers.
"""

import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..._extras import require
from .texts import end_of, for_screen

# The prompts that are shown; all are in `samples.jsonl`. A longer prompt loses its start, since
# the answer follows its end.
ROWS, PROMPT_ROOM = 4, 200
_WIDTH = 100  # of the lines in a pipe or a file


def sampled(step: int, samples: Sequence[Mapping[str, Any]]) -> str:
    """The table of the first prompts, for the step after which they were answered."""
    table = require("rich.table", extra="train").Table(
        title=f"answers after step {step}", title_justify="left", show_lines=True
    )
    has_reference = any(sample["reference"] is not None for sample in samples)
    for name in ("prompt", "answer", "reference")[: 3 if has_reference else 2]:
        table.add_column(name, ratio=1, overflow="fold")
    for sample in samples[:ROWS]:
        table.add_row(*_cells(sample)[: 3 if has_reference else 2])
    if len(samples) > ROWS:
        table.caption = f"and {len(samples) - ROWS} more in samples.jsonl"
    return _drawn(table)


def _cells(sample: Mapping[str, Any]) -> list[Any]:
    text = require("rich.text", extra="train").Text
    answers = [
        (sample[name] or "") + " ..." * (sample[ended] is False)
        for name, ended in (("answer", "ended"), ("reference", "reference_ended"))
    ]
    return [text(for_screen(cell)) for cell in (end_of(sample["prompt"], PROMPT_ROOM), *answers)]


def _drawn(table: Any) -> str:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH
    file = io.StringIO()
    require("rich.console", extra="train").Console(file=file, width=width).print(table)
    return file.getvalue().rstrip("\n")
