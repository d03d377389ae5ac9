"""`--pack`: the numbers of a padded run, each pair once, the same bits when resumed, refusals."""

import json
import re

import numpy as np
import pytest

from dpo_eqx.cli.commands import train as command

from .commands import moved
from .interrupted import check_resumes_with_the_same_bits
from .runs import lines_of
from .small import MODEL, small, write_data

# All pairs in one step, so that packed and padded runs have the same steps.
WHOLE = {"batch_size": 12, "steps": 2, "warmup_steps": 0, "dropout": False, "schedule": "constant"}


def numbered(path, rows=12, **numbers):
    """Preferences of token ids with further columns of numbers."""
    records = [json.loads(line) for line in write_data(path, rows).read_text().splitlines()]
    rng = np.random.default_rng(3)
    for record in records:
        record |= {name: float(rng.uniform(low, high)) for name, (low, high) in numbers.items()}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def same_numbers(one, other, name="metrics.jsonl"):
    for mine, theirs in zip(lines_of(one, name), lines_of(other, name), strict=True):
        names = mine.keys() - {"tokens_per_second", "update_fraction"}
        assert names == theirs.keys() - {"tokens_per_second", "update_fraction"}
        for key in names:
            np.testing.assert_allclose(mine[key], theirs[key], rtol=2e-4, atol=2e-6, err_msg=key)


CASES = {
    "weights": ({"weight": (0.0, 2.0)}, {}),
    "offsets": ({"offset": (0.0, 2.0), "weight": (0.5, 2.0)}, {"loss": ["odpo"]}),
    "reference": ({"reference_chosen": (-20, -10), "reference_rejected": (-20, -10)}, {}),
    "coupled": ({}, {"loss": ["bco_pair", "aot"], "microbatches": 2}),
    "precomputed": ({"beta": (0.1, 0.5)}, {"precompute_reference": True}),
    "devices": ({}, {"mesh": "data=4,tensor=2", "microbatches": 2}),
    "metrics": (
        {"weight": (0.5, 2.0)},
        {"metrics": ["entropy", "accuracy", "logits", "num_tokens"], "microbatches": 2},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_packed_run_has_the_numbers_of_a_padded_one(case, tmp_path):
    numbers, flags = CASES[case]
    numbered(tmp_path / "data.jsonl", **numbers)
    held_out = numbered(tmp_path / "eval.jsonl", 7, **numbers)
    given = {**WHOLE, "cache": tmp_path / "cache", "eval_data": held_out, **flags}
    if case == "precomputed":
        # A reference of its own: beside an equal one, rounding decides the accuracy at first.
        given["reference"] = moved(MODEL, tmp_path / "reference")
    assert small(tmp_path, output=tmp_path / "packed", pack=True, **given) == 0
    # On one device and without microbatches.
    given = {name: value for name, value in given.items() if name not in ("mesh", "microbatches")}
    assert small(tmp_path, output=tmp_path / "padded", **given) == 0
    for name in ("metrics.jsonl", "eval.jsonl"):
        same_numbers(tmp_path / "packed", tmp_path / "padded", name)


def test_each_pair_is_trained_once_and_the_padding_is_told(tmp_path, monkeypatch, capsys):
    seen = []

    make_advance = command.make_advance

    def watched(*given, **more):
        advance = make_advance(*given, **more)

        def record(state, batch, number):
            seen.append(batch.index[batch.index >= 0].tolist())
            return advance(state, batch, number)

        return record

    monkeypatch.setattr(command, "make_advance", watched)
    write_data(tmp_path / "data.jsonl", 25)
    assert small(tmp_path, pack=True, pack_length=40, epochs=1, steps=99) == 0
    assert sorted(number for step in seen for number in step) == list(range(25))
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["shapes"]
    out = capsys.readouterr().out
    assert facts in out
    assert f"1 shape to compile over {len(seen)} steps" in facts
    assert " x 40 tokens" in facts
    assert "without packing" in facts


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(tmp_path, monkeypatch):
    held_out = write_data(tmp_path / "eval.jsonl", 5, 1)
    given = {"pack": True, "eval_data": held_out, "eval_every": 2}
    names = "metrics.jsonl", "eval.jsonl"
    check_resumes_with_the_same_bits(tmp_path, monkeypatch, *names, **given)


REFUSED = {
    "too short": ({"pack_length": 9}, "`--pack-length` must hold each pair, .* got 9, and"),
    "no use": (
        {"pack": False, "pack_length": 99},
        "`--pack-length` is for packed rows; give `--pack`",
    ),
    "order": ({"shuffle": False}, "`--pack` and `--no-shuffle` contradict"),
    "batch": (
        {"batch_size": 2, "pack_length": 400},
        "`--batch-size` must be about the number of pairs in 1 packed rows .* smaller `--pack-l",
    ),
    "rewards": (
        {"loss": ["bradley_terry"], "reward_head": True},
        "`--reward-head` and `--pack` contradict",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tmp_path, capsys):
    flags, message = REFUSED[case]
    write_data(tmp_path / "data.jsonl", 25)
    assert small(tmp_path, **{"pack": True, **flags}) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.replace("\n", " ")), error


def completions(path, rows, seed=0, labelled=False):
    """Single completions of token ids, ragged; if labelled, some of them are undesirable."""
    records = [json.loads(line) for line in write_data(path, rows, seed).read_text().splitlines()]
    records = [
        {"prompt_ids": record["prompt_ids"], "completion_ids": record["chosen_ids"]}
        | ({"label": number % 3 > 0} if labelled else {})
        for number, record in enumerate(records)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"loss": ["sft"], "metrics": ["entropy", "num_tokens"]},
        {"loss": ["bco"]},
        {"loss": ["sft"], "mesh": "data=4,tensor=2", "microbatches": 2},
    ],
)
def test_packed_completions_have_the_numbers_of_padded_ones(flags, tmp_path):
    labelled = flags["loss"] != ["sft"]
    completions(tmp_path / "data.jsonl", 12, labelled=labelled)
    held_out = completions(tmp_path / "eval.jsonl", 7, 1, labelled=labelled)
    given = {**WHOLE, "eval_data": held_out}
    assert small(tmp_path, output=tmp_path / "packed", pack=True, **given, **flags) == 0
    facts = json.loads((tmp_path / "packed" / "run.json").read_text())["data"]["shapes"]
    rows = int(re.search(r"(\d+) x \d+ tokens and 12.0 completions a step", facts)[1])
    assert rows < 12, facts
    flags = {name: value for name, value in flags.items() if name not in ("mesh", "microbatches")}
    assert small(tmp_path, output=tmp_path / "padded", **given, **flags) == 0
    for name in ("metrics.jsonl", "eval.jsonl"):
        same_numbers(tmp_path / "packed", tmp_path / "padded", name)


@pytest.mark.slow
def test_a_resumed_run_on_completions_has_the_same_bits(tmp_path, monkeypatch):
    completions(tmp_path / "data.jsonl", 20)
    given = {"pack": True, "pack_length": 24, "loss": ["sft"]}
    check_resumes_with_the_same_bits(tmp_path, monkeypatch, "metrics.jsonl", **given)


def test_mismatched_completions_are_not_packed(tmp_path, capsys):
    completions(tmp_path / "data.jsonl", 12, labelled=True)
    assert small(tmp_path, pack=True, loss=["kto"]) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert "`--pack` has no completions of other prompts, with which KTO compares" in error
    assert small(tmp_path, pack=True, pack_length=3, loss=["bco"]) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert "`--pack-length` must hold each completion with its prompt; got 3" in error
