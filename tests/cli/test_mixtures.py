"""Several `--data` with weights, and `--eval-fraction`: from the flags to the rows of a run."""

import dataclasses
import json
import re

import pytest

from dpo_eqx import losses
from dpo_eqx.cli.compose.preferences import prepare_all
from dpo_eqx.cli.settings.check import check
from dpo_eqx.cli.settings.settings import Settings
from dpo_eqx.cli.settings.sources import DataSource, sources_of

from .runs import lines_of, train
from .small import MODEL, SETTINGS, write_data


@pytest.fixture
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b:0.3", "12:30", "d"):
        (tmp_path / name).write_text("")


WORDS = [
    (("a.jsonl",), [("a.jsonl", None)]),
    (("a.jsonl:0.3", "cc:0.7"), [("a.jsonl", 0.3), ("cc", 0.7)]),
    (("owner/name:2", "a.jsonl:1e-1"), [("owner/name", 2.0), ("a.jsonl", 0.1)]),
    (("a.jsonl:.25", "b:0.3"), [("a.jsonl", 0.25), ("b:0.3", None)]),
    (("b:0.3:0.5", "12:30"), [("b:0.3", 0.5), ("12:30", None)]),
    ((r"C:\data\a.jsonl",), [(r"C:\data\a.jsonl", None)]),
    ((r"C:\data:x\a.jsonl:0.5", r"D:\b:0.5"), [(r"C:\data:x\a.jsonl", 0.5), (r"D:\b", 0.5)]),
    (("C:0.5",), [("C:0.5", None)]),
    (("http://host:8080",), [("http://host:8080", None)]),
    (("hf://host:80/a.jsonl:0.5", "cc"), [("hf://host:80/a.jsonl", 0.5), ("cc", None)]),
    (("no:such",), [("no:such", None)]),
    (("d:0.5", "cc"), [("d", 0.5), ("cc", None)]),
]


@pytest.mark.usefixtures("_in_folder")
@pytest.mark.parametrize(("words", "sources"), WORDS)
def test_a_weight_stands_behind_the_last_colon(words, sources):
    assert sources_of(words) == [DataSource(*source) for source in sources]


WRONG = [
    ((), "must name a source"),
    (("a.jsonl:0.3",), "A weight in `--data` is for several sources; got a.jsonl:0.3 alone"),
    (("a.jsonl:half", "cc:1"), r"weight of a.jsonl .* must be a positive number.*got 'half'"),
    (("a.jsonl:", "cc:1"), "weight of a.jsonl .* must be a positive number.*got ''"),
    (("cc:-1", "a.jsonl:1"), "weight of cc .* must be a positive number.*got '-1'"),
    (("cc:nan", "a.jsonl:1"), "weight of cc .* got 'nan'"),
    (("cc", "d", "cc"), "each source once; cc is there twice"),
    (("cc", "d:1"), "must sum to less than 1 if a source has none; got 1"),
]


@pytest.mark.usefixtures("_in_folder")
@pytest.mark.parametrize(("words", "message"), WRONG)
def test_wrong_sources(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check(Settings(model="m", data=words, output=tmp_path))


def settings_of(folder, *data, **more):
    return Settings(model=str(MODEL), data=data, output=folder / "run", batch_size=4, **more)


def prepared_of(settings):
    check(settings)
    return prepare_all(settings, losses.dpo)


def ids(rows):
    return [tuple(map(tuple, (r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]))) for r in rows]


def test_the_mixture_reaches_the_run_and_says_its_shares(tmp_path):
    small = write_data(tmp_path / "small.jsonl", rows=6, seed=1)
    large = write_data(tmp_path / "large.jsonl", rows=40, seed=2)
    (prepared,) = prepared_of(settings_of(tmp_path, f"{small}:0.3", f"{large}:0.7"))
    assert len(prepared.rows) == 20
    of_small = {tuple(json.loads(line)["chosen_ids"]) for line in small.read_text().splitlines()}
    assert sum(tuple(row["chosen_ids"]) in of_small for row in prepared.rows) == 6
    assert "mixture of 20 rows an epoch:\n" in prepared.told
    assert f"  6 of 6 rows (30.0%) from {small}\n" in prepared.told
    assert prepared.told.endswith(f"  14 of 40 rows (70.0%) from {large}")
    assert (prepared.report.read, prepared.report.kept) == (46, 20)


def test_a_fraction_is_held_out_of_every_source(tmp_path):
    paths = [write_data(tmp_path / f"{n}.jsonl", rows=60, seed=n) for n in (1, 2)]
    whole = {row for path in paths for row in ids(map(json.loads, path.read_text().splitlines()))}
    settings = settings_of(tmp_path, *map(str, paths), eval_fraction=0.3)
    training, held_out = prepared_of(settings)
    kept, out = ids(training.rows), ids(held_out.rows)
    assert {row[0] for row in kept}.isdisjoint({row[0] for row in out})
    assert {*kept, *out} == whole
    assert 15 < len(out) < 60
    assert re.search(r"left out \d+: records held out for evaluation", training.told)
    other = prepared_of(dataclasses.replace(settings, eval_fraction=0.31))
    assert other[0].fingerprint != training.fingerprint != held_out.fingerprint


CONTRADICTIONS = [
    ({"eval_data": ("e",)}, "`--eval-fraction` and `--eval-data` contradict each other"),
    ({"eval_split": "e"}, "`--eval-fraction` and `--eval-split` contradict each other"),
    ({"eval_fraction": 1.0}, "`--eval-fraction` must be above 0 and below 1; got 1.0"),
]


@pytest.mark.parametrize(("more", "message"), CONTRADICTIONS)
def test_a_fraction_contradicts_other_held_out_data(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check(settings_of(tmp_path, "d", **{"eval_fraction": 0.1, **more}))


def test_nothing_held_out_is_an_error(tmp_path):
    path = write_data(tmp_path / "a.jsonl", rows=4)
    with pytest.raises(ValueError, match=r"No row is left(.|\n)*another `--eval-fraction`"):
        prepared_of(settings_of(tmp_path, str(path), eval_fraction=1e-9))


def test_sources_of_two_kinds_are_refused(tmp_path):
    one = write_data(tmp_path / "a.jsonl", rows=4)
    records = [json.loads(line) | {"offset": 1.0} for line in one.read_text().splitlines()]
    other = tmp_path / "b.jsonl"
    other.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = settings_of(tmp_path, str(one), str(other))
    message = f"same columns of numbers: {other} has `offset`, and {one} does not"
    with pytest.raises(ValueError, match=message):
        prepare_all(settings, losses.odpo)


@pytest.mark.slow
def test_a_run_of_a_mixture_evaluates_and_continues(tmp_path, capsys):
    paths = [write_data(tmp_path / f"{n}.jsonl", rows=40, seed=n) for n in (1, 2)]
    flags = {
        **SETTINGS,
        "data": [f"{paths[0]}:0.25", f"{paths[1]}:0.75"],
        "eval_fraction": 0.2,
        "dropout": False,
    }
    assert train(**flags, output=tmp_path / "whole") == 0
    assert "rows (25.0%) from" in capsys.readouterr().out
    assert train(**flags | {"steps": 3}, output=tmp_path / "run") == 0
    assert train(**flags, output=tmp_path / "run", resume=True) == 0

    def losses_of(name):
        return [line["loss"] for line in lines_of(tmp_path / name)]

    assert losses_of("run") == losses_of("whole")
    assert len(lines_of(tmp_path / "run", "eval.jsonl")) >= 2
    flags["data"] = [f"{paths[0]}:0.5", f"{paths[1]}:0.5"]
    assert train(**flags | {"steps": 8}, output=tmp_path / "run", resume=True) == 2
    assert "`data` was" in capsys.readouterr().err
