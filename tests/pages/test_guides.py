"""The guides: each block of Python and each command that they show runs; no link is broken.

A guide is a page of the folders in `FOLDERS`, the list of frequent questions, and what lies beside
README. The tests of the other pages check what their examples compute.
"""

import pytest

from dpo_eqx.cli import main
from dpo_eqx.cli.commands.evaluate import Evaluate
from dpo_eqx.cli.commands.generate import Generate
from dpo_eqx.cli.commands.inspect import Inspect
from dpo_eqx.cli.commands.plan import PlanFlags
from dpo_eqx.cli.settings.settings import Settings
from dpo_eqx.cli.settings.shared_flags import parse_flags

from .as_users import as_users, run
from .fences import DOCS, KINDS, ROOT, anchors, blocks, commands, kinds_of, links

FOLDERS = ("start", "howto", "coming_from", "explanation", "reference")
GUIDES = [
    *sorted(page for folder in FOLDERS for page in (DOCS / folder).glob("*.md")),
    *(
        page
        for page in (DOCS / "faq.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")
        if page.exists()
    ),
]
FLAGS = {
    "train": Settings,
    "evaluate": Evaluate,
    "generate": Generate,
    "inspect": Inspect,
    "plan": PlanFlags,
}
# These compile many programs.
LONG = {DOCS / "reference" / name for name in ("core.md", "models.md", "sharding.md")}
PYTHON = [
    pytest.param(page, marks=pytest.mark.slow if page in LONG else ())
    for page in GUIDES
    if blocks(page, "python")
]
SHELL = [page for page in GUIDES if blocks(page, "sh")]


def named(page):
    return str(page.relative_to(ROOT).with_suffix(""))


@pytest.mark.parametrize("page", PYTHON, ids=named)
def test_the_python_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", SHELL, ids=named)
def test_the_commands_of_the_page_run(page, workplace, capsys):
    with as_users():
        for arguments in commands(page):
            status = main(arguments)
            assert status == 0, f"dpo-eqx {' '.join(arguments)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", SHELL, ids=named)
def test_the_flags_of_the_page_exist(page, capsys):
    """Quickly, what running the commands would also find."""
    for name, *arguments in commands(page):
        try:
            parse_flags(FLAGS[name], name, arguments)
        except SystemExit:
            pytest.fail(f"dpo-eqx {name}: {capsys.readouterr().err}")


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_each_block_has_a_kind(page):
    """A block without a kind would run nowhere."""
    assert kinds_of(page) <= KINDS
    commands(page)


@pytest.mark.parametrize("page", GUIDES, ids=named)
def test_the_links_of_the_page_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(other), f"{target}: no such heading"
