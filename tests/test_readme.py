"""README's examples, run as they stand there."""

import re
import textwrap
from pathlib import Path

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks():
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.M | re.S)


@pytest.fixture(scope="module")
def ran():
    """All of README's Python in one namespace, as a reader would type it."""
    namespace = {}
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        for block in blocks():
            exec(compile(textwrap.dedent(block), str(README), "exec"), namespace)
    return namespace


def test_the_loop_learns_the_preferences(ran):
    assert ran["first"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert ran["metrics"]["rewards/accuracies"] == 1.0
    assert ran["metrics"]["loss"] < 0.4


def test_the_first_example_has_about_twenty_lines():
    lines = [line for line in blocks()[0].splitlines() if line.strip()]
    assert len(lines) <= 40


def test_readme_is_a_front_door():
    assert len(README.read_text().splitlines()) <= 150
