"""The fenced blocks and the links of a Markdown page. What a block does is not decided here.

A block of `python` runs in the tests, and so do the `dpo-eqx` commands of a block of `sh`. A block
that needs a cluster, another library or a GPU is `text`, or is `py` if it is Python.
"""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
KINDS = {"python", "sh", "py", "text", "yaml", "toml"}


def blocks(page, *kinds):
    """The blocks of these kinds, in their order, each with empty lines before it.

    The empty lines keep the page's line numbers, so that a traceback names the line of the page.
    """
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    return [
        "\n" * text.count("\n", 0, match.start(2)) + match[2]
        for match in found
        if not kinds or match[1] in kinds
    ]


def kinds_of(page):
    """The kinds of the page's blocks; the kind of a block without a name is empty."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return {line[3:] for line in [line for line in lines if line.startswith("```")][::2]}


def commands(page):
    """The arguments of each `dpo-eqx` command in the page's `sh` blocks.

    Raises `AssertionError` if such a block has a line that the tests cannot run.
    """
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                assert words[0] == "dpo-eqx", f"{page.name}: `{line}` is not a dpo-eqx command"
                found.append(words[1:])
    return found


def links(page):
    """The targets of the page's relative links, outside of blocks of code."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page):
    """The anchors of the page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#{1,6} (.*)$", text, flags=re.M)
    plain = [re.sub(r"\]\([^)]*\)", "]", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}
