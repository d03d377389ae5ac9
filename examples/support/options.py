"""The options of the quickstart's command line."""

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
    options = parser.parse_args(arguments)
    # Checked now, since the picture is drawn after all the work.
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
