"""The pages of the reference say what the code says: names, flags and messages."""

import ast
import re
from pathlib import Path

import pytest

from dpo_eqx.cli import main
from dpo_eqx.cli._main import COMMANDS

from ..test_public import public
from .scripts import script

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
PAGES = {
    "core": "dpo_eqx",
    "losses": "dpo_eqx.losses",
    "models": "dpo_eqx.models",
    "data": "dpo_eqx.data",
    "sharding": "dpo_eqx.sharding",
}


@pytest.mark.parametrize(("page", "namespace"), PAGES.items())
def test_each_public_name_has_an_entry(page, namespace):
    listed = re.findall(r"^::: (\S+)$", (REFERENCE / f"{page}.md").read_text(), flags=re.M)
    names = {f"{namespace}.{name}" for name, _ in public(namespace) if name != "losses"}
    assert len(listed) == len(set(listed))
    assert set(listed) == names


def test_the_page_of_flags_is_up_to_date():
    flags = script("flags")
    assert flags.page() == flags.PAGE.read_text(), "run: python docs/scripts/flags.py"


def test_the_page_of_flags_has_those_of_the_parser(capsys):
    text = (REFERENCE / "flags.md").read_text()
    sections = re.split(r"^## `dpo-eqx (\w+)`$", text, flags=re.M)
    pages = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert pages.keys() == COMMANDS.keys()
    for name, page in pages.items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        # A flag begins its line, and a switch is shown with what switches it off.
        lines = re.findall(r"^\W* (--[a-z][\w-]*)", capsys.readouterr().out, flags=re.M)
        listed = re.findall(r"^\| `(--.*?)` \|", page, flags=re.M)
        assert sorted(listed) == sorted(lines), name


def messages():
    """The texts in the code, with `…` for what is put in, and without backticks and line breaks."""
    for path in (ROOT / "dpo_eqx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                yield "".join(parts).replace("`", "")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value.replace("`", "")


def test_each_quoted_message_stands_in_the_code():
    quoted = re.findall(r"^### `(.*)`$", (REFERENCE / "errors.md").read_text(), flags=re.M)
    assert len(quoted) > 40
    known = "\n".join(messages())
    for message in quoted:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        assert re.search(".*".join(parts), known), f"no message of the code has {message!r}"


@pytest.mark.parametrize(
    ("source", "name"),
    [(source, name) for source in ("drawings", "plots") for name in script(source).DRAWINGS],
)
def test_each_drawing_is_up_to_date(source, name):
    drawings = script(source)
    drawn = drawings.DRAWINGS[name]().svg()
    path = drawings.FOLDER / f"{name}.svg"
    assert drawn == path.read_text(), f"run: python docs/scripts/{source}.py"
