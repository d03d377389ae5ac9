"""The tutorials: what a script prints is on its page, and the page has all cells of the script.

Tolerance: a number of the page may differ by 2% or by 0.03 from the number that is printed here,
since other releases of JAX round other sums. Words must be equal.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from ..pages.fences import DOCS, ROOT, blocks
from .scripts import script

NAMES = script("tutorials").NAMES
PAGES = DOCS / "tutorials"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def cells(text):
    """The kinds and the sources of the cells of a script, as its page has them."""
    for part in re.split(r"^# %%", text, flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        if "markdown" in head:
            yield "markdown", re.sub(r"^# ?", "", body, flags=re.M).strip()
        else:
            yield "code", body.strip()


@pytest.mark.parametrize("name", NAMES)
def test_the_page_and_the_notebook_have_the_cells_of_the_script(name):
    text = (ROOT / "examples" / "tutorials" / f"{name}.py").read_text()
    page = (PAGES / f"{name}.md").read_text()
    notebook = json.loads((PAGES / f"{name}.ipynb").read_text())["cells"]
    written = list(cells(text))
    assert [(c["cell_type"], "".join(c["source"]).strip()) for c in notebook] == written
    for kind, source in written[1:]:
        assert (f"```python\n{source}\n```" if kind == "code" else source) in page, (
            f"run: python docs/scripts/tutorials.py {name}"
        )


def test_each_tutorial_is_on_the_first_page():
    linked = re.findall(r"\]\((\w+)\.md\)", (PAGES / "index.md").read_text())
    assert sorted(linked) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_script_prints_what_the_page_shows(name):
    environment = dict(os.environ, MPLBACKEND="agg", PYTHONPATH=str(ROOT))
    environment.pop("XLA_FLAGS", None)
    path = ROOT / "examples" / "tutorials" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, text=True, check=True
    )
    shown = "".join(block.lstrip("\n") for block in blocks(PAGES / f"{name}.md", "text"))
    for ours, theirs in zip(done.stdout.splitlines(), shown.splitlines(), strict=True):
        numbers = ([float(x) for x in NUMBER.findall(line)] for line in (ours, theirs))
        np.testing.assert_allclose(*numbers, rtol=0.02, atol=0.03, err_msg=theirs)
        assert words(ours) == words(theirs)


def words(line):
    """A line without its numbers and without the columns' padding."""
    return NUMBER.sub("#", line).split()
