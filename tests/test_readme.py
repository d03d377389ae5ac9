"""README's examples, run as they stand there."""

from pathlib import Path

import pytest

from .pages.as_users import run
from .pages.fences import blocks

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def ran():
    """All of README's Python in one namespace, as a reader would type it."""
    return run(README)


def test_the_loop_learns_the_preferences(ran):
    assert ran["first"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert ran["metrics"]["rewards/accuracies"] == 1.0
    assert ran["metrics"]["loss"] < 0.4


def test_the_first_example_has_about_twenty_lines():
    lines = [line for line in blocks(README, "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 40


def test_readme_is_a_front_door():
    assert len(README.read_text().splitlines()) <= 150
