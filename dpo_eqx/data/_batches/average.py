"""What the weighted means of a step run over: rows, or the scored tokens of single completions."""

from typing import Literal

Average = Literal["rows", "tokens"]


def check_average(average: Average, *, single: bool) -> None:
    """Raises `ValueError` for another word, and for `"tokens"` unless rows are single completions.

    A pair has two completions, so no one number of tokens can be its weight.
    """
    if average not in ("rows", "tokens") or (average == "tokens" and not single):
        raise ValueError(
            '`average` must be "rows", or "tokens" for rows of single completions; got '
            f"{average!r} for {'single completions' if single else 'pairs'}."
        )
