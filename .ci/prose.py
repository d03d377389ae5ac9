"""Checks that the project's prose is plain: Markdown, docstrings, comments, help texts and errors.

    python .ci/prose.py                        # every tracked file that has prose, except tests
    python .ci/prose.py docs dpo_eqx/cli       # these folders or files
    python .ci/prose.py --all README.md        # warnings, too
    python .ci/prose.py --count                # how many findings each rule has

The rules are Vale's, in `.vale/styles/dpo_eqx`; each file says why it exists. This program reads
`existence`, `substitution`, `occurrence` and `conditional` rules, so that a machine without Vale
can apply them. It adds one rule: lines of prose in Markdown have at most 120 characters.

It prints `file:line: rule: message`, and exits with 1 if a rule of level `error` has a finding.
`prose_text.py` finds the prose in a file.
"""

import argparse
import collections
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from prose_text import Prose, markdown_prose, prose_lines, python_prose, sentences

ROOT = Path(__file__).resolve().parent.parent
STYLES = ROOT / ".vale" / "styles"
FOLDERS = ("dpo_eqx", "examples", "benchmarks", ".ci", "docs")
TRACKED = ("*.md", *(f"{folder}/*.py" for folder in FOLDERS), ":!tests")
MAX_COLUMNS = 120

# From a text on one line, and all prose of its file: the offset and the message of each finding.
Find = Callable[[str, str], Iterator[tuple[int, str]]]


class Rule(NamedTuple):
    """A rule of the style."""

    name: str
    level: str
    scope: str
    find: Find


class Finding(NamedTuple):
    """A place in a file that breaks a rule."""

    line: int
    rule: str
    level: str
    message: str


def main() -> int:
    """Checks what the command line asks for, and returns the exit status."""
    parser = argparse.ArgumentParser(description="Checks that the project's prose is plain.")
    parser.add_argument("paths", nargs="*", type=Path, help="Files or folders.")
    parser.add_argument("--all", action="store_true", help="Print warnings, too.")
    parser.add_argument("--count", action="store_true", help="Print counts only.")
    flags = parser.parse_args()
    rules = read_rules()
    counts = collections.Counter()
    failed = False
    for path in files(flags.paths):
        for line, rule, level, message in check(path, path.read_text(encoding="utf-8"), rules):
            failed |= level == "error"
            if level != "error" and not flags.all:
                continue
            counts[rule] += 1
            if not flags.count:
                shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
                print(f"{shown}:{line}: {rule}: {message}")
    if flags.count:
        print("\n".join(f"{count:5d} {rule}" for rule, count in counts.most_common()))
    return int(failed)


def files(paths: list[Path]) -> Iterator[Path]:
    """The files to check: those in `paths`, or the tracked ones if `paths` is empty."""
    if not paths:
        listed = subprocess.check_output(["git", "ls-files", *TRACKED], cwd=ROOT, text=True)
        paths = [ROOT / name for name in listed.splitlines()]
    for path in paths:
        if path.is_dir():
            yield from sorted([*path.rglob("*.md"), *path.rglob("*.py")])
        else:
            yield path


def check(path: Path, source: str, rules: list[Rule]) -> list[Finding]:
    """The findings in one file, in the order of its lines."""
    if path.suffix == ".md":
        pieces, found = list(markdown_prose(source)), list(long_lines(source))
    else:
        pieces, found = list(python_prose(source, fields_are_help="cli" in path.parts)), []
    whole = "\n".join(piece.text.replace("\n", " ") for piece in pieces)
    for rule in rules:
        for piece in pieces:
            for offset, message in apply(rule, piece, whole):
                line = piece.line + piece.text.count("\n", 0, offset)
                found.append(Finding(line, rule.name, rule.level, message))
    return sorted(found)


def apply(rule: Rule, piece: Prose, whole: str) -> Iterator[tuple[int, str]]:
    """The findings of a rule in a piece of prose, if the rule has this scope."""
    text = piece.text.replace("\n", " ")
    if rule.scope == "sentence":
        for start, sentence in sentences(text):
            for offset, message in rule.find(sentence, whole):
                yield start + offset, message
    elif set(rule.scope.split(".")) <= set(piece.scope.split(".")):
        yield from rule.find(text, whole)


def long_lines(source: str) -> Iterator[Finding]:
    """Lines of prose that are too long; tables and the targets of links do not count."""
    for number, line in enumerate(prose_lines(source), 1):
        length = len(re.sub(r"\]\([^)]*\)|https?://\S+", "", line))
        if length > MAX_COLUMNS and not line.startswith("|"):
            message = f"Wrap this line of {length} characters at {MAX_COLUMNS}."
            yield Finding(number, "LineLength", "error", message)


def read_rules() -> list[Rule]:
    """The rules of the style."""
    return [read_rule(path) for path in sorted((STYLES / "dpo_eqx").glob("*.yml"))]


def read_rule(path: Path) -> Rule:
    """One rule. Raises `KeyError` if it extends what is not supported here."""
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    make = {
        "existence": existence,
        "substitution": substitution,
        "occurrence": occurrence,
        "conditional": conditional,
    }[form["extends"]]
    return Rule(path.stem, form["level"], form["scope"], make(form))


def pattern_of(form: dict[str, Any], tokens: list[str]) -> re.Pattern[str]:
    """An expression for any of the tokens, as whole words unless the rule says `nonword`."""
    either = "|".join(tokens)
    whole_words = either if form.get("nonword") else rf"\b(?:{either})\b"
    return re.compile(whole_words, re.IGNORECASE if form.get("ignorecase") else 0)


def existence(form: dict[str, Any]) -> Find:
    """Finds any of `tokens`, except those that contain one of `exceptions`."""
    pattern = pattern_of(form, form["tokens"])
    exceptions = pattern_of({}, form.get("exceptions", ["(?!)"]))

    def find(text: str, _: str) -> Iterator[tuple[int, str]]:
        for match in pattern.finditer(text):
            if not exceptions.search(match[0]):
                yield match.start(), form["message"].replace("%s", match[0])

    return find


def substitution(form: dict[str, Any]) -> Find:
    """Finds any key of `swap`, and suggests its value."""
    swaps = [(pattern_of(form, [key]), better) for key, better in form["swap"].items()]

    def find(text: str, _: str) -> Iterator[tuple[int, str]]:
        for pattern, better in swaps:
            for match in pattern.finditer(text):
                yield match.start(), form["message"] % (better, match[0])

    return find


def occurrence(form: dict[str, Any]) -> Find:
    """Finds a text in which `token` occurs more than `max` times."""
    token = re.compile(form["token"])

    def find(text: str, _: str) -> Iterator[tuple[int, str]]:
        if len(token.findall(text)) > form["max"]:
            yield 0, form["message"]

    return find


def conditional(form: dict[str, Any]) -> Find:
    """Finds `first`, unless the vocabulary or a group of `second` in the file has it."""
    first, second = re.compile(form["first"]), re.compile(form["second"])
    vocabulary = (STYLES / "config/vocabularies/dpo_eqx/accept.txt").read_text().split()
    known = pattern_of({}, vocabulary)

    def find(text: str, whole: str) -> Iterator[tuple[int, str]]:
        for match in first.finditer(text):
            if not known.fullmatch(match[0]) and match[0] not in second.findall(whole):
                yield match.start(), form["message"].replace("%s", match[0])

    return find


if __name__ == "__main__":
    sys.exit(main())
