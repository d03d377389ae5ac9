"""The command line of the quickstart, and the checks that other examples share."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parse(description: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with status 2 and a message if one is wrong."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data",
        type=Path,
        help="JSON Lines, plain or gzip, with prompt, chosen and rejected, or without prompt.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Random seed (%(default)s).")
    parser.add_argument("--steps", type=positive, help="Number of DPO steps.")
    parser.add_argument("--fit-steps", type=positive, help="Number of steps to fit the reference.")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("quickstart.png"),
        help="File for the picture (%(default)s).",
    )
    return checked(parser, arguments)


def checked(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits if there is no folder for the picture, which is drawn after all work."""
    options = parser.parse_args(arguments)
    if not options.output.parent.is_dir():
        parser.error(
            f"`--output` must be in a folder that exists; there is no folder "
            f"{options.output.parent}. Make it first."
        )
    return options


def positive(text: str) -> int:
    """The positive whole number that `text` holds."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"It must be a positive whole number; got {text!r}.")
    return int(text)
