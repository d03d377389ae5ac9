"""What the scripts of the gallery share."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from shared import entry, intervals, table


def test_an_interval_is_students():
    values = np.random.default_rng(0).normal(size=(7, 3))
    mean, half = intervals.interval(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    np.testing.assert_allclose(mean - half, expected.low, rtol=1e-12)
    np.testing.assert_allclose(mean + half, expected.high, rtol=1e-12)


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 seeds"):
        intervals.interval(np.zeros((1, 3)))


def test_a_table_is_markdown():
    lines = table.markdown(["loss", "KL"], [["dpo", "1.0"], ["kto", "12.5"]]).splitlines()
    assert lines == ["| loss |   KL |", "|------|-----:|", "| dpo  |  1.0 |", "| kto  | 12.5 |"]


@pytest.mark.parametrize(("flags", "expected"), [([], 10), (["--quick"], 2)])
def test_an_entry_leaves_a_picture_and_a_table(tmp_path, capsys, flags, expected):
    entry.run(
        "squares",
        full=10,
        quick=2,
        compute=lambda size: size**2,
        table=lambda result: f"result {result}",
        picture=lambda _: Figure(figsize=(1, 1)),
        arguments=[*flags, "--output", str(tmp_path / "new"), "-f", "kernel.json"],
    )
    assert f"result {expected**2}" in capsys.readouterr().out
    assert (tmp_path / "new" / "squares.md").read_text() == f"result {expected**2}\n"
    assert (tmp_path / "new" / "squares.png").read_bytes().startswith(b"\x89PNG")
