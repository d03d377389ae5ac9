"""The report as one page of HTML that needs no network.

`panels.py` draws its panels; `read.py` reads the numbers.
"""

import dataclasses
import html
import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ...data._tokens.report import CUT, DROPPED, REASONS
from ..run.best import Best, in_words, why_early
from ..settings.goal import Goal, prefix
from ..settings.settings import Settings
from ..terminal.texts import end_of, for_screen
from . import curves as curves
from .panels import cards, curve_panels, pair_panels
from .read import Columns, Record, held_out_sets

# The steps whose answers are shown, evenly spaced.
MOST_STEPS = 8


def page(records: Sequence[Record]) -> str:
    """The whole page."""
    title = ", ".join(record.name for record in records)
    style = (
        importlib.resources.files("dpo_eqx.cli.report").joinpath("report.css").read_text("utf-8")
    )
    body = "\n".join(part for part in _sections(records) if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><h1>{_text(title)}</h1>\n{body}\n</body></html>\n"
    )


def _sections(records: Sequence[Record]) -> Iterator[str]:
    yield _remarks(records)
    yield _chosen(records)
    yield _numbers(records)
    lengths = [len(r.metrics.get("step", ())) for r in records]
    note = ""
    if max(lengths) > curves.MOST_POINTS:
        steps = f"{-(-max(lengths) // curves.BUCKETS):,}"
        note = (
            f"For long runs, a line shows means of neighbouring steps (up to {steps}), and "
            "the band around it spans their least and greatest values. "
        )
    if any(record.evaluations for record in records):
        note += f"Open {_points(records)} are the held-out pairs."
    yield _section("Training", note, cards(curve_panels(records), records))
    if panels := pair_panels(records):
        yield _section("Pairs", _about_pairs(records), cards(panels, records))
    for record in records:
        of_run = f": {record.name}" if len(records) > 1 else ""
        yield _samples(record, f"Samples{of_run}")
        yield _samples_during(record, f"Answers during training{of_run}")
    yield _data(records)
    settings = [record.settings for record in records]
    changed, defaults = _split(settings)
    yield _section("Settings", "Only non-default settings.", _table(changed, records, settings))
    table = _table(defaults, records, settings)
    yield f"<details><summary>Default settings</summary>{table}</details>"
    machines = [r.facts.get("versions", {}) | r.facts.get("hardware", {}) for r in records]
    names = list(dict.fromkeys(name for machine in machines for name in machine))
    yield _section("Versions and hardware", "", _table(names, records, machines))


def _remarks(records: Sequence[Record]) -> str:
    lines = [f"{_of(r, records)}{remark}" for r in records for remark in r.remarks]
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f'<ul class="remarks">{items}</ul>' if items else ""


def _chosen(records: Sequence[Record]) -> str:
    """Which evaluation gave the model of each run with `--keep-best`, and an early end."""
    lines = []
    for record in records:
        best = record.facts.get("best")
        if not best:
            continue
        goal = Goal(best["metric"], best["maximise"])
        found = Best(*(best[field.name] for field in dataclasses.fields(Best)))
        lines.append(f"{_of(record, records)}model/ is {in_words(found, goal)}.")
        if best["stopped_early"]:
            why = why_early(found, goal, best["last_step"])
            lines.append(f"{_of(record, records)}The run {why}.")
    return "".join(f"<p>{_text(line)}</p>" for line in lines)


def _points(records: Sequence[Record]) -> str:
    """The kinds of points that show evaluations."""
    most = max(len(held_out_sets(record.evaluations)) for record in records)
    return "circles" if most == 1 else "points"


def _numbers(records: Sequence[Record]) -> str:
    """The first and the last numbers of each run, and of its held-out data if there is any."""
    names = {
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
        "logps/chosen": "log-probability of chosen",
        "logps/rejected": "log-probability of rejected",
    }
    columns = [["", *names.values()]]
    for record in records:
        sources = {"training": ("", record.metrics)}
        for held_out in held_out_sets(record.evaluations):
            words = f"held out {held_out}".rstrip()
            sources[words] = (prefix(held_out), record.evaluations)
        for words, (before, lines) in sources.items():
            for place in _first_and_last(lines):
                step = f"{int(lines['step'][place]):,}"
                found = [lines.get(before + name) for name in names]
                cells = [number(math.nan if v is None else v[place]) for v in found]
                columns.append([f"{_of(record, records)}{words}, step {step}", *cells])
    return _rows("numbers", list(zip(*columns, strict=True))) if len(columns) > 1 else ""


def _first_and_last(lines: Columns) -> tuple[int, ...]:
    """The places of the lines for the table of numbers."""
    return (0, -1)[: len(lines.get("step", ()))]


def _about_pairs(records: Sequence[Record]) -> str:
    """The pairs that the pictures show, for each run."""
    sentences = []
    for record in records:
        found = next((x for x in (record.after, record.before) if x and x.get("margin")), None)
        if found is None:
            continue
        count, kind = len(found["margin"]), found["data"]
        pairs = "1 pair" if count == 1 else f"{count} pairs"
        trained = ", on which the policy was trained: no held-out data was given"
        end = trained if kind == "training" else ""
        sentences.append(f"{_of(record, records)}{pairs} of the {kind} data{end}.")
    return " ".join(sentences)


def _samples(record: Record, title: str) -> str:
    """The policy's answers to the same prompts, before and after training."""
    sides = {"before": record.before or {}, "after": record.after or {}}
    drawn = {name: found["samples"] for name, found in sides.items() if found.get("samples")}
    if not drawn:
        reasons = {found["no_samples"] for found in sides.values() if found.get("no_samples")}
        return _section(title, "", f"<p>{_text(' '.join(reasons))}</p>") if reasons else ""
    answered = []
    for samples in zip(*drawn.values(), strict=False):
        answers = {name: (s["text"], s["ended"]) for name, s in zip(drawn, samples, strict=True)}
        answered.append(_answered(samples[0]["prompt"], answers))
    note = "Sampled at temperature 1 with the same random numbers; ... marks an answer cut off."
    return _section(title, note, f'<div class="cards">{"".join(answered)}</div>')


def _samples_during(record: Record, title: str) -> str:
    """The answers to each prompt of `--sample-every`, at some of the steps, and the reference's."""
    if not record.samples:
        return ""
    places = np.linspace(0, len(record.samples) - 1, min(MOST_STEPS, len(record.samples)))
    steps = [record.samples[int(place)] for place in places]
    answered = []
    # Another `--sample-prompts` of a continued run may have fewer prompts.
    for number, last in enumerate(steps[-1]):
        answers = {}
        if last.get("reference") is not None:
            answers["reference"] = last["reference"], last.get("reference_ended") is not False
        for lines in steps:
            if number < len(lines) and lines[number]["prompt"] == last["prompt"]:
                line = lines[number]
                answers[f"step {line['step']:,}"] = line["answer"], line.get("ended") is not False
        answered.append(_answered(last["prompt"], answers))
    note = "All use the same random numbers; ... marks an answer cut off."
    if len(steps) < len(record.samples):
        note += f" {len(steps)} of {len(record.samples)} steps are shown; samples.jsonl has all."
    return _section(title, note, f'<div class="cards">{"".join(answered)}</div>')


def _answered(prompt: str, answers: Mapping[str, tuple[str, bool]]) -> str:
    """A prompt with answers by their title, each with whether it ended by itself."""
    prompt = end_of(prompt, 400)
    parts = "".join(
        f"<h4>{name}</h4><pre>{_screen(text)}{' ...' * (not is_ended)}</pre>"
        for name, (text, is_ended) in answers.items()
    )
    return f'<div class="sample"><h4>prompt</h4><pre>{_screen(prompt)}</pre>{parts}</div>'


def _screen(text: str) -> str:
    """An answer or a prompt, in which control characters are escaped."""
    return _text(for_screen(text))


def _data(records: Sequence[Record]) -> str:
    """The form of the training data, and the fate of its records."""
    tables = [_data_of(record.facts.get("data", {})) for record in records]
    names = list(dict.fromkeys(name for table in tables for name in table))
    is_dropped = any(name.startswith("dropped") for name in names)
    note = "" if is_dropped or not names else "No record was dropped."
    return _section("Data", note, _table(names, records, tables)) if names else ""


def _data_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    rows = {
        name: facts[name]
        for name in ("form", "records", "rows", "tokens", "shapes")
        if name in facts
    }
    for reason, count in facts.get("counts", {}).items():
        kind = "dropped" if reason in DROPPED else "cut" if reason in CUT else "noted"
        rows[f"{kind}: {REASONS.get(reason, reason)}"] = count
    return rows


def _split(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The names of settings that differ from the default in some run, and of all other settings."""
    fields = {f.name.replace("_", "-"): f.default for f in dataclasses.fields(Settings)}
    names = list(dict.fromkeys(name for setting in settings for name in setting))

    def is_default(name: str) -> bool:
        default = fields.get(name)
        # YAML has lists, but no tuples.
        default = list(default) if isinstance(default, tuple) else default
        return all(setting.get(name) == default for setting in settings)

    return [n for n in names if not is_default(n)], [n for n in names if is_default(n)]


def _table(
    names: Sequence[str], records: Sequence[Record], tables: Sequence[Mapping[str, Any]]
) -> str:
    """A row for each name and a column for each run; rows that differ between runs come first."""
    rows = [
        [name, *(_value(table[name]) if name in table else "\N{EN DASH}" for table in tables)]
        for name in names
    ]
    # The sort is stable, so both groups keep the order of the settings.
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    header = [["", *(record.name for record in records)]] if len(records) > 1 else []
    return _rows("pairs", header + rows) if rows else ""


def _section(title: str, note: str, content: str) -> str:
    words = f"<p>{_text(note)}</p>" if note else ""
    return f"<section><h2>{_text(title)}</h2>{words}{content}</section>"


def _rows(kind: str, rows: Sequence[Sequence[str]]) -> str:
    lines = ("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table class="{kind}">{body}</table></div>'


def _of(record: Record, records: Sequence[Record]) -> str:
    return f"{record.name}: " if len(records) > 1 else ""


def number(value: float | int) -> str:
    """A number with four digits; below 1e-5, a rounding error of log-probabilities, it is 0."""
    if math.isnan(value):
        return "\N{EN DASH}"
    return "0" if abs(value) < 1e-5 else f"{value:,.4g}"


def _value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    return html.escape(text)
