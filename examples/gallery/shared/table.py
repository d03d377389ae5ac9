"""Tables in Markdown, which is what a terminal and a page both show well."""

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a header; the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    left, *right = widths
    rule = "|".join(["-" * (left + 2), *("-" * (width + 1) + ":" for width in right)])
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
