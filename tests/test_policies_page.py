"""The examples of `docs/policies.md`, run as they stand there."""

import re

import equinox as eqx
import numpy as np
import pytest

from .pages.as_users import run
from .pages.fences import DOCS

PAGE = DOCS / "policies.md"


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(PAGE)
    shown = re.search(r"shows this:\n\n```\n(.*?)    \.\.\.\n```", PAGE.read_text(), flags=re.S)
    assert str(names["report"]).startswith(shown[1])
    loss = np.asarray(names["metrics"]["loss"])
    assert loss.shape == (100,)
    assert loss[0] == pytest.approx(np.log(2), abs=1e-6)
    embedding = names["policy"].model.embedding.weight
    np.testing.assert_array_equal(embedding, names["reference"].model.embedding.weight)
    # As trained, after both ways to save and restore: a file of Equinox, and one of Orbax.
    restored = eqx.combine(names["arrays"], names["static"])
    assert eqx.tree_equal((names["policy"], names["opt_state"]), restored)
