"""The output folder: the paths in it, the run that it holds, and the facts in its `run.json`.

`checkpoints.py` writes checkpoints, and `sinks.py` lines of metrics.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ..compose.data import Prepared
from ..settings.check import flag
from ..settings.settings import Settings
from ..settings.yaml_file import differences, read_settings, write_settings

# A continued run may change these: they set its length and what it writes, not what it learns.
FREE = (
    *("output", "steps", "epochs", "eval_every", "save_every", "keep", "log", "cache", "mesh"),
    *("save_dtype", "report", "compilation_cache", "reference_offload", "optimizer_offload"),
    *("log_norms", "eval_at_start", "early_stop", "sample_every", "sample_prompts"),
    "sample_tokens",
)
PACKAGES = ("dpo-eqx", "jax", "jaxlib", "equinox", "optax", "orbax-checkpoint", "grain", "numpy")


class Folder:
    """The paths in an output folder; `begin` creates it.

    **Arguments:**

    - `path`: the folder itself.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.run = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "eval.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.model = path / "model"
        self.adapter = path / "adapter"
        self.probes = path / "report"
        self.before = self.probes / "before.json"
        self.after = self.probes / "after.json"
        self.page = path / "report.html"
        self.picture = path / "report.png"

    def check(self, settings: Settings) -> None:
        """Raises `ValueError` or `OSError` if this run must not, or cannot, write to the folder."""
        _check_writable("output", self.path)
        if settings.cache is not None:
            _check_writable("cache", settings.cache)
        names = [path.name for path in vars(self).values() if path != self.path and path.exists()]
        if not names or self._has_no_step():
            return
        if not settings.resume:
            raise ValueError(
                f"`--output` must be a new folder; {self.path} holds a run already "
                f"({', '.join(sorted(names))}). Continue it with `--resume`, or give another "
                "folder."
            )
        if self.config.exists():
            _check_same(settings, self.config)

    def begin(self, settings: Settings, facts: Mapping[str, Any], step: int) -> None:
        """Makes the folder, and writes the settings and facts of a run that starts at `step`."""
        if not step:
            # Loading took a while, in which another run may have taken the folder.
            self.check(settings)
        self.path.mkdir(parents=True, exist_ok=True)
        if not step:
            self._clear()
        starts = self.starts()
        starts.append({"step": step, "time": datetime.datetime.now(datetime.UTC).isoformat()})
        write_settings(settings, self.config)
        replace_text(self.run, json.dumps({**facts, "starts": starts}, indent=1) + "\n")

    def note(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to those of the run."""
        known = json.loads(self.run.read_text())
        replace_text(self.run, json.dumps({**known, **facts}, indent=1) + "\n")

    def _has_no_step(self) -> bool:
        """Whether a run began here and took no step, so that another start may replace its files.

        `run.json` tells them from a user's own, such as a `config.yaml` for a run to come.
        """
        later = (self.checkpoints, self.model, self.adapter, self.after, self.page, self.picture)
        has_lines = self.metrics.exists() and self.metrics.stat().st_size > 0
        return self.run.is_file() and not has_lines and not any(path.exists() for path in later)

    def _clear(self) -> None:
        """Removes the files of an earlier run that never reached a complete checkpoint."""
        lines = (self.metrics, self.evaluations, self.samples)
        for path in (self.run, *lines, self.before, self.after):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)

    def starts(self) -> list[dict[str, Any]]:
        """The time and step of each start of the run, the first and every continuation."""
        return json.loads(self.run.read_text())["starts"] if self.run.exists() else []

    def number_at(self, step: int, name: str) -> float:
        """The number `name` in the line of metrics of `step`, or 0 if there is no such line."""
        text = self.metrics.read_text() if step and self.metrics.exists() else ""
        # The last line may be half written; the lines up to a checkpoint are whole.
        lines = (line for line in text.splitlines() if line.startswith(f'{{"step": {step},'))
        return next((json.loads(line).get(name, 0.0) for line in lines), 0.0)

    def inputs(self) -> dict[str, str | None]:
        """The digests of what the run in this folder reads, as far as they are known."""
        facts = json.loads(self.run.read_text()) if self.run.exists() else {}
        return facts.get("inputs") or {"--data": facts.get("data", {}).get("fingerprint")}


def facts_of(
    prepared: Prepared, shapes: object, inputs: Mapping[str, str | None]
) -> dict[str, Any]:
    """The facts in `run.json`: versions, data, digests of the inputs, hardware."""
    report = prepared.report
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in PACKAGES},
        "data": {
            "fingerprint": prepared.fingerprint,
            "form": str(prepared.form),
            "records": report.read,
            "rows": report.kept,
            "tokens": report.tokens,
            "counts": dict(report.counts),
            "shapes": str(shapes),
        },
        "inputs": dict(inputs),
        "hardware": {
            "platform": devices[0].platform,
            "device": devices[0].device_kind,
            "devices": len(devices),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
    }


def replace_text(path: Path, text: str) -> None:
    """Replaces a file atomically: after a crash it has either the old or the new content."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Replaces a binary file atomically, as `replace_text` replaces a text file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_writable(name: str, path: Path) -> None:
    """Raises `OSError` if the folder of the setting `name` cannot be made or written to."""
    # A link to nothing does not exist, but no folder can be made in its place.
    nearest = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not nearest.is_dir():
        kind = "a file" if nearest.exists() else "a link to nothing"
        raise NotADirectoryError(
            f"{flag(name)} must be a folder; {nearest} is {kind}. Give another path."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{flag(name)} must be a folder to write to; {nearest} is not writable. Give another "
            "folder, or change its permissions."
        )


def _check_same(settings: Settings, config: Path) -> None:
    changed = differences(settings, read_settings(config, type(settings)))
    words = [
        f"{flag(name)} was {_shown(then)}, is {_shown(now)}"
        for name, (then, now) in changed.items()
        if name not in FREE
    ]
    if words:
        raise ValueError(
            f"`--resume` must continue the run in {config.parent} with its own settings; got other "
            f"values: {'; '.join(words)}. Give the same settings, or another `--output`."
        )


def _shown(value: Any) -> str:
    """The value of a flag, as a user gives it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == ():
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def finite(value: Any) -> Any:
    """`value` with `None` for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
