"""Reads the files of a run for the report, also of a run that is unfinished or damaged.

Nothing is drawn here. `remarks` lists the files that could not be read.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ..._extras import require
from ..run.folder import Folder

# All columns of a file have one length; two files may have two lengths.
Columns = dict[str, Float[np.ndarray, " _lines"]]


@dataclasses.dataclass(frozen=True)
class Record:
    """The files of a run, as far as they exist.

    - `name`: the name of its folder; `path`: the path of the folder.
    - `settings`, `facts`: the content of `config.yaml` and of `run.json`.
    - `metrics`, `evaluations`: for each name a number in each line, NaN if the line lacks it, and
        `step`; empty if there are no lines.
    - `before`, `after`: the output of `report_probe` at the start and at the end.
    - `remarks`: sentences about missing or broken files.
    - `samples`: the answers during the run, a list for each step at which they were drawn.
    """

    name: str
    path: Path
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    metrics: Columns
    evaluations: Columns
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    remarks: list[str]
    samples: Sequence[Sequence[Mapping[str, Any]]] = ()


def read_record(path: Path) -> Record:
    """The run in a folder, as far as its files exist.

    **Raises:**

    `ValueError` or `FileNotFoundError` if the folder holds no file of a run.
    """
    folder = Folder(path)
    if not path.is_dir():
        raise FileNotFoundError(f"`OUTPUT` must be the folder of a run; there is no folder {path}.")
    needed = (folder.metrics, folder.run, folder.config)
    if not any(file.exists() for file in needed):
        names = ", ".join(file.name for file in needed)
        raise ValueError(f"`OUTPUT` must be the folder of a run; {path} has none of {names}.")
    remarks: list[str] = []
    metrics = read_lines(folder.metrics, remarks)
    record = Record(
        name=path.absolute().name,
        path=path,
        settings=_settings(folder.config, remarks),
        facts=_json(folder.run, remarks) or {},
        metrics=metrics,
        evaluations=read_lines(folder.evaluations, remarks),
        before=_json(folder.before, remarks),
        after=_json(folder.after, remarks),
        remarks=remarks,
        samples=read_samples(folder.samples, remarks),
    )
    if not folder.model.exists():
        last = int(metrics["step"][-1]) if metrics else 0
        remarks.append(f"The run has not come to its end: no model yet, last step {last}.")
    if not metrics:
        remarks.append("No step has been logged yet.")
    return record


def read_lines(path: Path, remarks: list[str]) -> Columns:
    """The lines of a file of JSON Lines as columns, in the order of their steps.

    A broken line is left out, with a remark. A killed run leaves a broken last line.
    """
    return _columns(_lines(path, remarks))


def read_samples(path: Path, remarks: list[str]) -> list[list[Mapping[str, Any]]]:
    """The lines of `samples.jsonl`, those of a step together. Broken lines are left out."""
    steps: dict[int, list[Mapping[str, Any]]] = {}
    for line in _lines(path, remarks):
        if isinstance(line.get("prompt"), str) and isinstance(line.get("answer"), str):
            steps.setdefault(line["step"], []).append(line)
    return [steps[step] for step in sorted(steps)]


def _lines(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """The lines of a file that can be read; a remark reports the other lines."""
    if not path.exists():
        return []
    parsed = [_line(text) for text in path.read_bytes().splitlines()]
    lines = [line for line in parsed if line is not None]
    broken = len(parsed) - len(lines)
    if broken:
        is_last = broken == 1 and parsed[-1] is None
        which = "The last line" if is_last else f"{broken} of {len(parsed)} lines"
        remarks.append(f"{which} of {path.name} cannot be read and is left out.")
    return lines


def held_out_sets(evaluations: Columns) -> list[str]:
    """The names of the held-out sets of a run; an empty name if it has one set without a name."""
    if "eval/loss" in evaluations:
        return [""]
    parts = [name.split("/") for name in evaluations if name.startswith("eval/")]
    return list(dict.fromkeys("/".join(part[1:-1]) for part in parts if part[-1] == "loss"))


def _line(text: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        line = json.loads(text)
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            return line
    return None


def _columns(lines: list[dict[str, Any]]) -> Columns:
    # An evaluation has a line for each held-out set.
    merged: dict[int, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):
        merged.setdefault(line["step"], {}).update(line)
    lines = list(merged.values())
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: _numbers([line.get(name) for line in lines]) for name in names}


def _numbers(values: list[Any]) -> Float[np.ndarray, " lines"]:
    """The values as numbers, with NaN for a value that is not a number."""
    with contextlib.suppress(ValueError, TypeError):
        return np.array(values, float)  # all at once; this turns `None` into NaN
    return np.array([v if isinstance(v, int | float) else math.nan for v in values], float)


def _json(path: Path, remarks: list[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        remarks.append(f"{path.name} cannot be read and is left out.")
        return None
    return value


def _settings(path: Path, remarks: list[str]) -> dict[str, Any]:
    yaml = require("yaml", extra="train")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        value = None
    if not isinstance(value, dict):
        remarks.append(f"{path.name} cannot be read and is left out.")
        return {}
    return value


def unique_names(records: Iterable[Record]) -> list[Record]:
    """The records with unique names: runs of the same name get their path as name."""
    records = list(records)
    names = [record.name for record in records]
    return [
        dataclasses.replace(r, name=str(r.path)) if names.count(r.name) > 1 else r for r in records
    ]
