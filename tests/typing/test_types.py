"""The contracts as a type checker sees them: right calls check, wrong calls do not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def errors():
    """The lines of `wrong_calls.py` and `right_calls.py` that pyright reports."""
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent))
    if pyright is None:
        pytest.skip("pyright comes with the extra `dev`")
    files = [str(HERE / name) for name in ("right_calls.py", "wrong_calls.py")]
    command = [pyright, "--outputjson", "--pythonpath", sys.executable, *files]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parents[1])
    found = {"right_calls.py": set(), "wrong_calls.py": set()}
    for diagnostic in json.loads(result.stdout)["generalDiagnostics"]:
        if diagnostic["severity"] == "error":
            line = diagnostic["range"]["start"]["line"] + 1
            found[Path(diagnostic["file"]).name].add(line)
    return found


def test_right_calls_check(errors):
    assert errors["right_calls.py"] == set()


def test_each_wrong_call_is_an_error(errors):
    lines = (HERE / "wrong_calls.py").read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    assert wrong
    assert errors["wrong_calls.py"] == wrong
