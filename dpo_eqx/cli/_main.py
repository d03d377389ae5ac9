"""The entry point: which command, and what becomes of an error.

A command is a function of its arguments; all of them are listed here.
"""

import os
import sys
from collections.abc import Callable, Sequence

from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.inspect import inspect
from .commands.report import report
from .commands.train import train
from .settings.parse import parse

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (lambda arguments: train(parse(arguments)), "train a policy on preferences"),
    "evaluate": (evaluate, "measure a policy against its reference on preferences"),
    "generate": (generate, "let a model answer prompts, or two side by side"),
    "report": (report, "draw what one run did, or compare several"),
    "inspect": (inspect, "show preferences as tokens, and what is scored of them"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, or 2 where its input is wrong.

    **Arguments:**

    - `arguments`: the command's name and its flags; by default those of the process.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ("--help",)
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"dpo-eqx: there is no command {name!r}.\n{usage()}", file=sys.stderr)
        return 2
    return _run(name, rest)


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<10} {words}" for name, (_, words) in COMMANDS.items()]
    return "\n".join(["usage: dpo-eqx COMMAND ...", "", *lines, "", "dpo-eqx COMMAND --help"])


def _run(name: str, arguments: Sequence[str]) -> int:
    command, _ = COMMANDS[name]
    try:
        command(arguments)
    except (ValueError, OSError, ImportError) as error:
        # What the library raises so is meant to be read by whoever gave the input. Where it is
        # not, somebody who looks for the reason wants the traceback.
        if os.environ.get("DPO_EQX_TRACEBACK"):
            raise
        print(f"dpo-eqx {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dpo-eqx {name}: interrupted", file=sys.stderr)
        return 130
    return 0
