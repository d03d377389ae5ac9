"""The table of pushes in `docs/howto/choose_a_loss.md` is what the block above it computes."""

import re

import pytest

from .as_users import run
from .fences import DOCS

PAGE = DOCS / "howto" / "choose_a_loss.md"


def test_the_table_is_what_the_block_computes():
    names = run(PAGE)
    text = PAGE.read_text().split("## What each loss asks for")[1]
    header, *rows = re.findall(r"^\| (?:`(.*?)`|loss) \| (.*) \|$", text, flags=re.M)
    rows = dict([row for row in rows if re.match(r"-?\d", row[1])])
    assert rows.keys() == names["table"].keys()
    assert header[1].split(" | ") == list(names["states"])
    for name, cells in rows.items():
        shown = [[float(x) for x in cell.split(", ")] for cell in cells.split(" | ")]
        for pair, want in zip(shown, names["table"][name], strict=True):
            assert pair == pytest.approx(want, abs=6e-4), name
