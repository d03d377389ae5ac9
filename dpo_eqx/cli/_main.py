"""The entry point: it chooses the command, and turns errors into messages.

A command is a function of its arguments; this file lists all commands.
"""

import importlib.metadata
import io
import os
import sys
from collections.abc import Callable, Sequence

from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.inspect import inspect
from .commands.label import label
from .commands.online import online
from .commands.plan import plan
from .commands.report import report
from .commands.sample import sample
from .commands.train import train
from .run.out_of_memory import explained
from .settings.parse import parse
from .settings.shared_flags import in_given_names
from .settings.words import in_flags

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (lambda arguments: train(parse(arguments)), "train a policy on preferences"),
    "evaluate": (evaluate, "measure a policy against its reference on preferences"),
    "generate": (generate, "let a model answer prompts, or two models side by side"),
    "sample": (sample, "draw several answers to each prompt"),
    "label": (label, "judge drawn answers by a reward, and pair them"),
    "online": (online, "train a policy on pairs of its own answers, in rounds"),
    "report": (report, "draw the curves of a run, or compare several runs"),
    "plan": (plan, "say whether a step fits some devices, and what bounds it"),
    "inspect": (inspect, "show preferences as tokens, and which tokens are scored"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 2 if its input is wrong, 130 after Ctrl-C.

    **Arguments:**

    - `arguments`: the command's name and its flags; by default the arguments of the process.
    """
    _replace_what_cannot_be_shown()
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ("--help",)
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if "--version" in (name, *rest):
        print(version())
        return 0
    if name not in COMMANDS:
        print(f"dpo-eqx: There is no command {name!r}.\n{usage()}", file=sys.stderr)
        return 2
    return _run(name, rest)


def _replace_what_cannot_be_shown() -> None:
    """Lets a terminal with few characters show `?` for others, rather than end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def usage() -> str:
    """The commands, one on each line."""
    lines = [f"  {name:<10} {words}" for name, (_, words) in COMMANDS.items()]
    ends = ["", "dpo-eqx COMMAND --help", "dpo-eqx --version"]
    return "\n".join(["usage: dpo-eqx COMMAND ...", "", *lines, *ends])


def version() -> str:
    """The versions of this package and of what it computes with, for reports of faults."""
    packages = ("dpo-eqx", "jax", "jaxlib", "equinox", "optax")
    return "\n".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def _run(name: str, arguments: Sequence[str]) -> int:
    command, _ = COMMANDS[name]
    try:
        with explained({}, "Give a smaller `--batch-size`, or shorter rows."):
            command(arguments)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        # The library writes the messages of these errors for the user. If a message does not
        # suffice, the variable gives the traceback.
        if os.environ.get("DPO_EQX_TRACEBACK"):
            raise
        print(f"dpo-eqx {name}: {in_given_names(in_flags(str(error)), arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dpo-eqx {name}: Interrupted.", file=sys.stderr)
        return 130
    return 0
