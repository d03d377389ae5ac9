"""`dpo-eqx report`: what one run did, or how several compare, as a page and a picture.

`train` calls it at its end; it reads what lies in the folders and nothing else.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from .display import say
from .folder import Folder, replace_bytes, replace_text
from .report_page import page
from .report_panels import picture
from .report_read import read_record, unique_names
from .source import parse_flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Draws what runs of `dpo-eqx train` have left, as far as they came, in `report.html` and
    `report.png`."""

    output: tuple[Path, ...]
    """The folders of the runs; several are compared."""
    into: Path | None = None
    """The folder to write to; by default that of the run, and of several the current one."""


def report(arguments: Sequence[str]) -> None:
    """The command, from its flags.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for whoever gave them.
    """
    flags = parse_flags(Report, "report", arguments, positional=True)
    if not flags.output:
        raise ValueError("`OUTPUT` must name the folder of a run, or of several.")
    into = flags.into or (flags.output[0] if len(flags.output) == 1 else Path())
    if flags.into is not None and not into.is_dir():
        raise FileNotFoundError(f"`--into` must be a folder that exists; there is no {into}.")
    write_report(flags.output, into)


def try_report(folder: Folder) -> None:
    """The report of a run that has come to its end, which does not fail for want of a picture."""
    try:
        write_report([folder.path], folder.path)
    except (OSError, ImportError) as error:
        say(f"no report: {error}")


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
