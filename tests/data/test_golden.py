"""The ids and batches of TRL 1.16 come out exactly; `tests/golden/data/README.md` says how made."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_eqx import data

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
CASES = [
    ("llama", "dataset", "sgd"),
    ("gpt2", "dataset", "sgd"),
    ("qwen3", "dataset", "sgd"),
    ("qwen3", "dataset_conversational", "sgd_conversational"),
]
COLLATION = json.loads((GOLDEN / "collation" / "collation.json").read_text())


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: data.load_tokenizer(GOLDEN / kind) for kind in ("llama", "gpt2", "qwen3")}


@pytest.mark.parametrize(("kind", "dataset", "run"), CASES)
def test_ids(kind, dataset, run, tokenizers):
    path = GOLDEN / kind / f"{dataset}.jsonl"
    rows, report = data.tokenize(data.read(path), tokenizers[kind])
    assert rows == json.loads((GOLDEN / kind / f"tokenized_{run}.json").read_text())
    assert (report.read, report.kept, report.dropped, report.cut) == (32, 32, {}, {})


def sequences(tokens, prompt):
    """What one half of TRL's batch holds: ids of prompt and completion, and how many are scored."""
    for ids, mask, start, there in zip(
        tokens.ids, tokens.mask, prompt.ids, prompt.mask, strict=True
    ):
        yield [*start[there].tolist(), *ids[mask].tolist()], int(mask.sum())


def halves(batch):
    chosen, rejected = (sequences(side, batch.prompt) for side in (batch.chosen, batch.rejected))
    return [*chosen, *rejected]


@pytest.mark.parametrize(("kind", "dataset", "run"), CASES)
def test_batches(kind, dataset, run, tokenizers):
    path = GOLDEN / kind / f"{dataset}.jsonl"
    rows, _ = data.tokenize(data.read(path), tokenizers[kind], max_length=80)
    with (
        data.batches(rows, batch_size=4, shuffle=False, epochs=2) as batches,
        np.load(GOLDEN / kind / f"batches_{run}.npz") as golden,
    ):
        assert len(batches) == 16
        for step, batch in enumerate(batches):
            names = ("input_ids", "attention_mask", "completion_mask")
            ids, there, scored = (golden[f"batch{step % 8}_{name}"] for name in names)
            want = [
                (i[t > 0].tolist(), s.sum()) for i, t, s in zip(ids, there, scored, strict=True)
            ]
            assert halves(batch) == want
            assert batch.weight.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("case", COLLATION)
def test_collation(case, tokenizers):
    form, limit = case.split("|max_length=")
    limit = None if limit == "None" else int(limit)
    name = "rows.jsonl" if form == "explicit" else "rows_implicit_prompt.jsonl"
    records, want = data.read(GOLDEN / "collation" / name), COLLATION[case]
    whole, _ = data.tokenize(records, tokenizers["llama"])
    kept = [row for row in whole if limit is None or len(row["prompt_ids"]) < limit]
    assert kept[: len(want["examples"])] == want["examples"]

    rows, report = data.tokenize(records, tokenizers["llama"], max_length=limit)
    assert len(rows) == report.kept == want["n_rows"]
    assert report.read == 22 == report.kept + sum(report.dropped.values())
    batch = next(data.batches(rows[:6], batch_size=6, shuffle=False))
    ids, scored = want["batch"]["input_ids"], want["batch"]["completion_mask"]
    for (got, count), row, mask in zip(halves(batch), ids, scored, strict=True):
        assert got == row[: len(got)]
        assert set(row[len(got) :]) <= {2}, "TRL's row holds more than ours"
        assert count == sum(mask)
