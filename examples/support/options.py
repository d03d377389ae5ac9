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
        help="JSON Lines, plain or gzip, with prompt, chosen and rejected (or only the last two)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--steps", type=positive, help="steps of DPO")
    parser.add_argument("--fit-steps", type=positive, help="steps that fit the reference")
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart.png"), help="picture (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if not options.output.parent.is_dir():  # now, not after the work
        parser.error(f"--output: there is no folder {options.output.parent} to put it in")
    return options


def positive(text: str) -> int:
    """A positive whole number."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)
