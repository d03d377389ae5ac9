"""The prose of a file: paragraphs of Markdown; docstrings, comments and messages of Python.

What the prose must be is not decided here: `prose.py` applies the rules.
"""

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

# What is not prose becomes one word, so that sentences keep their shape and their length.
MASKS = (
    (re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL), "Code"),
    (re.compile(r"\$\$.+?\$\$|\$(?!\s)[^$]+?(?<!\s)\$", re.DOTALL), "Maths"),
    (re.compile(r"<!--.*?-->|</?[a-z][^<>]*>", re.DOTALL), ""),
    (re.compile(r"(?<=\])\([^()\s]*\)"), ""),  # the target of a link
    (re.compile(r"https?://\S*[^\s.,;:)]"), "Link"),
    (re.compile(r"\*+(?=\S)|(?<=\S)\*+"), ""),
)
LIST_ITEM = re.compile(r"\s*(?:[-*+]|\d+\.)\s+")
BLOCK_OPENING = re.compile(r"```|~~~|\$\$|\?\?\?")
# Not after "e.g.", "et al." and "eq.", which a capital letter or a number may follow.
SENTENCE_END = re.compile(
    r"(?<!e\.g)(?<!i\.e)(?<!\bal)(?<!\beq)(?<!\bcf)(?<!\bvs)[.?!]['\")]*\s+(?=[A-Z\d\"'(\[])"
)
# At least five words, from a capital letter, a flag or a name in backticks to a full stop.
IS_SENTENCE = re.compile(r"[A-Z`-]\S*(?:\s+\S+){3,}\s+\S+[.?!]\s*")
DIRECTIVE = re.compile(
    r"(?:(?:type|pyright): ignore(?:\[[^\]]*\])?|noqa(?:: [A-Z\d, ]+)?|!.*):?\s*"
)


class Prose(NamedTuple):
    """One piece of text: a paragraph, a table cell, a comment or a message.

    - `scope`: in Vale's form, such as `text.help`.
    - `line`: the number of its first line, from 1.
    - `text`: code, maths and links are single words in it; line breaks are those of the file.
    """

    scope: str
    line: int
    text: str


def mask(text: str) -> str:
    """The text with code, maths and links as single words."""
    for pattern, word in MASKS:
        text = pattern.sub(lambda match, word=word: "\n" * match[0].count("\n") + word, text)
    return text


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """Each sentence of a text on one line, with its offset."""
    start = 0
    for match in SENTENCE_END.finditer(text):
        yield start, text[start : match.end()].rstrip()
        start = match.end()
    yield start, text[start:]


def prose_lines(source: str) -> list[str]:
    """The lines of Markdown, empty if they hold code, a displayed formula or a citation."""
    kept: list[str] = []
    closing = ""  # what ends the block that is skipped
    in_list = False
    for line in source.splitlines():
        bare, indented = line.strip(), line.startswith("    ")
        if closing == "???" and bare and not indented:
            closing = ""
        if closing:
            closing = "" if bare.endswith(closing) else closing
            kept.append("")
        elif opening := BLOCK_OPENING.match(bare):
            is_one_line = len(bare) > 3 and bare.endswith("$$")
            closing = "" if is_one_line else opening[0]
            kept.append("")
        else:
            in_list = bool(LIST_ITEM.match(line)) or (in_list and (indented or not bare))
            is_code = indented and not in_list and not (kept and kept[-1])
            kept.append("" if is_code else line.rstrip())
    return kept


def markdown_prose(source: str, first: int = 1, scope: str = "text") -> Iterator[Prose]:
    """Paragraphs, list items, headings and table cells of Markdown whose first line is `first`."""
    start, block = first, []
    for number, line in enumerate([*prose_lines(source), ""], first):
        item, is_single = LIST_ITEM.match(line), line.startswith(("|", "#"))
        if block and (not line or item or is_single):
            yield Prose(scope, start, mask("\n".join(block)))
            block = []
        if is_single:
            for cell in mask(line.lstrip("#")).split("|"):
                yield Prose(scope, number, cell.strip(" :-"))
        elif line:
            start = start if block else number
            block.append(line[item.end() :] if item else line.strip())


def python_prose(source: str, *, fields_are_help: bool) -> Iterator[Prose]:
    """Docstrings, messages of `raise`, other strings that are sentences, and comments."""
    tree = ast.parse(source)
    used = set()
    for string, is_field in docstrings(tree):
        used.add(string)
        head, _, rest = string.value.partition("\n")
        scope = "text.help" if is_field and fields_are_help else "text.docstring"
        yield from markdown_prose(f"{head.strip()}\n{textwrap.dedent(rest)}", string.lineno, scope)
    for argument in raised(tree):
        if " " in (text := message(argument)):
            used |= set(ast.walk(argument))
            yield Prose("text.error", argument.lineno, mask(text.strip()))
    for node in ast.walk(tree):
        if node not in used and IS_SENTENCE.fullmatch(text := message(node)):
            used |= set(ast.walk(node))
            yield Prose("text.string", node.lineno, mask(text.strip()))
    yield from comments(source)


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.Constant, bool]]:
    """Strings that are statements, and whether each describes the field before it."""
    for node in ast.walk(tree):
        body = node.body if isinstance(getattr(node, "body", None), list) else []
        for before, statement in zip([None, *body], body, strict=False):
            string = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(string, ast.Constant) and isinstance(string.value, str):
                yield string, isinstance(before, ast.AnnAssign)


def raised(tree: ast.Module) -> Iterator[ast.expr]:
    """The argument of each exception that is raised by a call with one argument."""
    for node in ast.walk(tree):
        error = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(error, ast.Call) and len(error.args) == 1:
            yield error.args[0]


def message(node: ast.AST) -> str:
    """The text of a string, with "Value" for what is computed; empty for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(message(part) or "Value" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = message(node.left), message(node.right)
        return (left or "Value") + (right or "Value") if left or right else ""
    return ""


def comments(source: str) -> Iterator[Prose]:
    """Comments without their `#`; those on neighbouring lines of their own are one."""
    start, column, block = 0, -1, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, place = token.start
        own_column = place if not token.line[:place].strip() else -1
        if block and (line != start + len(block) or own_column != column or column < 0):
            yield Prose("text.comment", start, mask("\n".join(block)))
            block = []
        start, column = (start, column) if block else (line, own_column)
        block.append(DIRECTIVE.sub("", token.string.lstrip("#").strip(), count=1))
    if block:
        yield Prose("text.comment", start, mask("\n".join(block)))
