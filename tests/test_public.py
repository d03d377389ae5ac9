"""The public surface: every name has a docstring and a place in the reference page."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest

from .pages.fences import DOCS, ROOT, blocks

REFERENCE = (DOCS / "reference.md").read_text()
EXAMPLES = "\n".join(
    block for page in (ROOT / "README.md", *DOCS.rglob("*.md")) for block in blocks(page, "python")
)
NAMESPACES = ["dpo_eqx", "dpo_eqx.losses", "dpo_eqx.models", "dpo_eqx.data", "dpo_eqx.sharding"]


def public(namespace):
    """The names that `__init__.py` re-exports, `from .x import y as y`."""
    module = importlib.import_module(namespace)
    exported = re.findall(r"(\w+) as \1\b", inspect.getsource(module))
    return [(name, getattr(module, name)) for name in exported]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_documented(namespace):
    names = public(namespace)
    assert names
    for name, value in names:
        assert inspect.getdoc(value), f"{namespace}.{name} has no docstring"
        assert f"`{name}`" in REFERENCE, f"{namespace}.{name} is not in docs/reference.md"


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_reference_page_names_nothing_else(namespace):
    section = REFERENCE.split(f"## `{namespace}`", 1)[1].split("\n## ", 1)[0]
    listed = set(re.findall(r"^\| `(\w+)`", section, flags=re.M))
    assert listed == {name for name, _ in public(namespace)}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_is_used_on_a_page(namespace):
    """The tests run every block of Python on the pages."""
    module = "dpx" if namespace == "dpo_eqx" else namespace.rpartition(".")[2]
    used = set(re.findall(rf"\b{module}\.(\w+)", EXAMPLES))
    assert {name for name, _ in public(namespace)} <= used


def test_the_core_imports_its_four_packages_and_no_other():
    """Side packages are imported where they are used: not by the core, not by importing it."""
    code = (
        "import sys, dpo_eqx; "
        "print(sorted({'safetensors', 'transformers', 'grain', 'matplotlib', 'rich', 'beartype', "
        "'dpo_eqx.models', 'dpo_eqx.data'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
