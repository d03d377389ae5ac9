"""`--pairs`, `--ties` and the offset of ODPO, from the file to the loss."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from dpo_eqx import data
from dpo_eqx.cli.compose.data import make_batches, prepare, reading
from dpo_eqx.cli.settings.settings import Settings

from .commands import one_message, run
from .runs import lines_of
from .small import MODEL, small, write_data

OFFSETS = np.arange(10) / 4


def write(folder, columns):
    """Token ids with further columns."""
    path = write_data(folder / "data.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [json.dumps(r | {n: v[i] for n, v in columns.items()}) for i, r in enumerate(records)]
    path.write_text("\n".join(lines))


SCORES = {"score_chosen": (OFFSETS + 1).tolist(), "score_rejected": [1.0] * 10}
ONCE = {"steps": 1, "batch_size": 10, "dropout": False, "save_every": 0, "schedule": "constant"}


SOURCES = [({}, OFFSETS), ({"offset_column": "margin"}, -OFFSETS)]


@pytest.mark.parametrize(("settings", "offsets"), SOURCES)
def test_the_offset_reaches_the_batch(settings, offsets, tmp_path):
    write(tmp_path, SCORES | {"margin": (-OFFSETS).tolist()})
    flags = {"model": str(MODEL), "data": (str(tmp_path / "data.jsonl"),), "output": tmp_path}
    settings = Settings(**flags, loss=("odpo",), batch_size=10, **settings)
    prepared = prepare(settings.data[0], settings, 96)
    with make_batches(prepared, settings, training=False) as batches:
        (batch,) = batches
    np.testing.assert_allclose(batch.per_pair["offset"], offsets, rtol=1e-6)
    packed = data.pack(prepared.rows, 64)
    pairs = packed.take(np.arange(packed.rows))
    order = np.argsort(pairs.index[pairs.index >= 0])
    np.testing.assert_allclose(pairs.per_pair["offset"][pairs.index >= 0][order], offsets)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"offset_column": "margin"}])
def test_the_offset_reaches_the_loss(settings, tmp_path):
    """The policy is its reference at first, so the loss is that of the offsets alone."""
    write(tmp_path, SCORES | {"margin": (-OFFSETS).tolist()})
    assert small(tmp_path, loss=["odpo"], **ONCE, **settings) == 0
    (line,) = lines_of(tmp_path / "run")
    offsets = -OFFSETS if settings else OFFSETS
    assert line["loss"] == pytest.approx(np.mean(np.log1p(np.exp(offsets))), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"loss": ("odpo",)}, True),
        ({"loss": ("sft", "odpo")}, True),
        ({}, False),
        ({"loss": ("odpo",), "loss_options": ("offset=0.5",)}, False),
        ({"loss": ("odpo",), "columns": ("offset=",)}, False),
    ],
)
def test_scores_are_an_offset_only_for_a_loss_that_takes_one(settings, wanted):
    settings = Settings(model="m", data=("d",), output=Path("o"), **settings)
    assert reading(settings)["offset_from_scores"] is wanted


WRONG = [
    ({"offset_column": "margin"}, "`--loss sigmoid` has no `offset`, and .* has a column `offset`"),
    ({"loss": ["odpo"], "offset_column": "gap"}, "maps `offset` to `gap`"),
    (
        {"loss": ["odpo"], "offset_column": "margin", "loss_options": ["offset=1"]},
        "`--loss-options offset` and the column `offset` of the data contradict each other",
    ),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_an_offset_that_has_no_use_is_an_error(settings, message, tmp_path, capsys):
    write(tmp_path, {"margin": OFFSETS.tolist()})
    assert small(tmp_path, **ONCE, **settings) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


ANSWERS = {"prompt": "Why?", "responses": [" a", " b", " c"], "scores": [1, 3, 2]}
TIE = {"prompt": "Why?", "responses": [" a", " b"], "scores": [1, 1]}


def test_flags_choose_the_pairs(models, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(ANSWERS) + "\n" + json.dumps(TIE))
    flags = ("inspect", "--model", models("llama"), "--data", path)
    _, out, _ = run(capsys, *flags)
    assert "1 records: 1 rows kept" in out
    assert "left out 1: answers in no pair" in out
    assert "left out 1: records whose answers are equally good" in out
    _, out, _ = run(capsys, *flags, "--pairs", "all", "--ties", "half")
    assert "5 records: 5 rows kept" in out
    assert "with `weight`" in out
    assert "left out" not in out
    path.write_text("".join(json.dumps(ANSWERS | {"lang": x}) + "\n" for x in ("en", "de", "en")))
    _, out, _ = run(capsys, *flags, "--where", "lang=en")
    assert "2 records: 2 rows kept" in out
    assert "left out 1: records that are not of lang=en" in out
    status, _, err = run(capsys, *flags, "--where", "language=en")
    one_message(status, err, "inspect", "`--where` names `language`, which line 1")
    status, _, err = run(capsys, *flags, "--columns", "responses=")
    one_message(status, err, "inspect", "must have the columns of one form")
