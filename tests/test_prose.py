"""Whether `.ci/prose.py` finds each kind of fault in prose, and leaves plain prose alone.

Whether the project's own prose is plain is not tested here: `.ci/run` checks it.
"""

import importlib
import sys
from pathlib import Path

import pytest

CI = Path(__file__).resolve().parent.parent / ".ci"
if not CI.exists():
    pytest.skip("a source distribution has no `.ci`", allow_module_level=True)

LONG = "Word " + " ".join(["word"] * 40) + "."
DOCSTRING = '"""Reads a file.\n\n{}\n"""\n'
FIELD = 'class Settings:\n    """Settings."""\n\n    seed: int = 0\n    """{}"""\n'
RAISE = "def f(x):\n    raise ValueError({})\n"

# The rule, the file, its text with a fault, the line of the fault.
FAULTS = [
    ("Conditions", "a.md", "Read it.\n\nIt raises `ValueError` where `x` is 0.", 3),
    ("Conditions", "a.md", "The key is `None` where dropout is off.", 1),
    ("Conditions", "a.md", "It is read\nwhere there is one.", 2),
    ("Conditions", "a.md", "It waits. Where a process is lost, the run ends.", 1),
    ("Conditions", "a.md", "- one\n- used where\n  `x` is given", 2),
    ("Conditions", "a.py", DOCSTRING.format("**Raises:**\n\n`OSError` where it is full."), 5),
    ("Conditions", "a.py", "x = 1\n# Raises where the axis is one of `vmap`.\n", 2),
    ("Conditions", "a.py", RAISE.format("'Mask `x` where it is empty.'"), 2),
    ("Idioms", "a.md", "It holds `x,\ny`, and so it is with adapters.", 2),
    ("Idioms", "a.md", "What the mask means is said by the caller.", 1),
    ("Idioms", "a.md", "|a|b|\n|-|-|\n|`f`|what a loss makes of a pair|", 3),
    ("Idioms", "a.md", "So it is with adapters, and not a NaN of theirs counts.", 1),
    ("Idioms", "a.py", "x = 1  # adapters that are gone on from\n", 1),
    ("Idioms", "a.py", "x = f'Rotary scaling {1} is not built, use another.'\n", 1),
    ("Fragments", "a.md", "It sums. Of several runs the first is drawn.", 1),
    ("SentenceLength", "a.md", f"Short one.\n{LONG}", 2),
    ("SentenceLength", "a.py", DOCSTRING.format(LONG), 3),
    ("Abbreviations", "a.md", "The QXZ is small.", 1),
    ("Abbreviations", "a.py", "# Compiled by QXZ.\n", 1),
    ("HelpTexts", "cli/a.py", FIELD.format("At its peak."), 5),
    ("HelpTexts", "cli/a.py", FIELD.format("How many steps."), 5),
    ("HelpTexts", "cli/a.py", FIELD.format("seed of the order."), 5),
    ("HelpTexts", "cli/a.py", FIELD.format("Seed of the order"), 5),
    ("ErrorMessages", "a.py", RAISE.format("'the rows must be sorted.'"), 2),
    ("ErrorMessages", "a.py", RAISE.format("f'`x` must be positive, got {x}'"), 2),
    ("ErrorMessages", "a.py", RAISE.format("'`x` must be ' + 'positive'"), 2),
    ("LineLength", "a.md", f"Plain.\n\n{'word ' * 25}", 3),
]

PLAIN = {
    "a.md": """# Where the time goes

Raises `ValueError` if `beta` is not positive. The value is 0 where the mask is false.
Tiled Matrix Unit (TMU): the TMU multiplies. See [the page](QXZ.md), https://x.org/QXZ,
$x \\text{ where there is none}$, and `what it makes of it`, which take part in 60 MB.

```
Of these:

raises where there is none: QXZ
```

    QXZ where there is none

| `raises where` | `QXZ` | a long cell """
    + "word " * 30
    + """|

??? cite
    QXZ et al., where there is none, 2023.

It says where the file lies. "Where" is a word for places.
""",
    "a.py": FIELD.format("How many steps")  # outside the command no help text
    + RAISE.format("f'`x` must be positive, got {x}. {hint}'")
    + RAISE.format("'The rows must be sorted.'")
    + "x = 'QXZ'  # pyright: ignore[reportX]: it is read above, 0 where `y` is masked\n",
    "cli/a.py": FIELD.format("Seed of the data order.\n\n    It is an integer."),
}


@pytest.fixture(scope="module")
def prose():
    """The program as a module."""
    sys.path.insert(0, str(CI))
    try:
        yield importlib.import_module("prose")
    finally:
        sys.path.remove(str(CI))


@pytest.fixture(scope="module")
def rules(prose):
    return prose.read_rules()


@pytest.mark.parametrize(("rule", "name", "text", "line"), FAULTS)
def test_a_fault_is_found_at_its_line(prose, rules, rule, name, text, line):
    found = prose.check(Path(name), text, rules)
    assert (rule, line, "error") in [(f.rule, f.line, f.level) for f in found]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_prose_has_no_finding(prose, rules, name):
    found = prose.check(Path(name), PLAIN[name], rules)
    assert [f for f in found if f.level == "error"] == []


def test_the_command_prints_each_fault_and_fails(prose, tmp_path, monkeypatch, capsys):
    (tmp_path / "b.md").write_text("It is so.\nIt is good.\n")
    monkeypatch.setattr(sys, "argv", ["prose.py", str(tmp_path)])
    assert prose.main() == 1
    printed = capsys.readouterr().out
    assert printed == f"{tmp_path}/b.md:1: Idioms: Write 'this way' instead of 'so'.\n"
    (tmp_path / "b.md").write_text("It is good, beside others.\n")  # a warning only
    assert prose.main() == 0
    assert capsys.readouterr().out == ""
