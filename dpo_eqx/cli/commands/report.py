"""`dpo-eqx report`: one run, or a comparison of several, as a page and a picture.

`train` calls it at its end. It reads nothing but the files in the folders of the runs.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..report.page import page
from ..report.panels import picture
from ..report.read import read_record, unique_names
from ..run.folder import Folder, replace_bytes, replace_text
from ..settings.shared_flags import parse_flags
from ..terminal.display import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Draws runs of `dpo-eqx train`, finished or not, in `report.html` and `report.png`."""

    output: tuple[Path, ...]
    """Folders of the runs; several runs are compared."""
    into: Path | None = None
    """Folder to write to (default: the folder of the run; for several runs the current folder)."""


def report(arguments: Sequence[str]) -> None:
    """Runs the command with its flags in `arguments`.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    flags = parse_flags(Report, "report", arguments, positional=True)
    if not flags.output:
        raise ValueError("`OUTPUT` must name the folder of a run, or of several.")
    into = flags.into or (flags.output[0] if len(flags.output) == 1 else Path())
    if flags.into is not None and not into.is_dir():
        raise FileNotFoundError(f"`--into` must be a folder that exists; there is no {into}.")
    write_report(flags.output, into)


def try_report(folder: Folder) -> None:
    """Writes the report of a finished run, which must not fail for lack of a picture."""
    try:
        write_report([folder.path], folder.path)
    except (OSError, ImportError) as error:
        say(f"No report: {error}")


def write_report(paths: Sequence[Path], into: Path) -> None:
    """Writes the page and the picture of the runs in `paths` to the folder `into`."""
    records = unique_names(read_record(path) for path in paths)
    target = Folder(into)
    replace_text(target.page, page(records))
    replace_bytes(target.picture, picture(records))
    for record in records:
        for remark in record.remarks:
            say(f"{record.name}: {remark}")
    say(f"report: {target.page}")
