"""Tokens drawn with their states: in colours on a terminal, with brackets elsewhere.

`cli/commands/inspect.py` finds the state of each token.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..._extras import require
from .display import say

# How each state is drawn on a terminal: two shades, so that neighbouring tokens can be told apart.
STYLES = {
    "context": ("grey70 on grey15", "grey70 on grey27"),
    "scored": ("black on bright_cyan", "black on bright_yellow"),
    "cut": ("strike red3", "strike magenta3"),
    "left out": ("dim", "dim"),
}
MARKS = {"context": "()", "scored": "[]", "cut": "{}", "left out": ("", "")}
LEGEND = {"context": "not scored", "scored": "scored", "cut": "cut off or dropped"}


class Token(NamedTuple):
    """A token to draw: its text, its state, its id as text, and whether it is a special token."""

    text: str
    state: str
    id: str = ""
    special: bool = False


def in_marks(tokens: Iterable[Token]) -> str:
    """The tokens as plain text, each in the brackets of its state."""
    return "".join(MARKS[t.state][0] + t.text + MARKS[t.state][1] for t in tokens)


def shortened(tokens: Iterable[Token], most: int) -> Iterator[Token]:
    """The tokens; a run of more than `most` in one state is shortened to its two ends."""
    for _, group in itertools.groupby(tokens, key=lambda token: token.state):
        run = list(group)
        left_out = len(run) - most if most else 0
        if left_out <= 0:
            yield from run
            continue
        end = len(run) - most // 2
        yield from run[: end - left_out]
        words = f" ... {left_out} more ... "
        yield Token(words, "left out", words.strip())
        yield from run[end:]


def write(title: str, tokens: Iterable[Token]) -> None:
    """Prints the tokens after a title."""
    if not sys.stdout.isatty():
        say(title + in_marks(tokens))
        return
    text = require("rich.text", extra="train").Text(title)
    for place, token in enumerate(tokens):
        bold = " bold underline" if token.special else ""
        text.append(token.text, style=STYLES[token.state][place % 2] + bold)
    require("rich.console", extra="train").Console(highlight=False).print(text, soft_wrap=True)


def write_legend() -> None:
    """Prints the legend of states."""
    between = Token(", ", "left out")
    states = ([Token(words, state), between] for state, words in LEGEND.items())
    write("", list(itertools.chain.from_iterable(states))[:-1])
