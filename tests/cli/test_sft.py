"""Supervised training by the command: against a plain PyTorch loop, and what is refused.

`make_sft.py` made the golden values.
"""

import json
import re

import equinox as eqx
import jax
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, losses
from dpo_eqx.models import load, load_lora, merge_lora

from .runs import DATA, TRACES, lines_of, same_weights, train, weights_of
from .small import MODEL, small

TRACE = json.loads((TRACES / "llama" / "sft.json").read_text())
TRAINING = {
    "batch_size": TRACE["batch_size"],
    "learning_rate": TRACE["learning_rate"],
    "loss": "sft",
    "optimizer": "sgd",
    "schedule": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "shuffle": False,
    "buckets": 1,
    "metrics": ["entropy", "logits", "num_tokens"],
}
NAMES = ["loss", "grad_norm", "mean_token_accuracy", "entropy", "logits/chosen", "num_tokens"]


@pytest.fixture(scope="module")
def completions(tmp_path_factory):
    """The golden prompts with their chosen answers, as many as the golden run reads."""
    path = tmp_path_factory.mktemp("data") / "completions.jsonl"
    lines = (DATA / "llama" / "dataset.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines[: 4 * len(TRACE["steps"])]]
    records = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Microbatches and devices hold different numbers of tokens: a mean of means would be wrong.
@pytest.mark.slow
@pytest.mark.parametrize("split", [{}, {"microbatches": 2, "mesh": "data=2,tensor=4"}])
def test_it_is_a_plain_pytorch_loop(split, completions, models, tmp_path):
    output = tmp_path / "run"
    assert train(model=models("llama"), data=completions, output=output, **TRAINING, **split) == 0
    lines = lines_of(output)
    assert len(lines) == len(TRACE["steps"])
    read = np.cumsum([step["tokens"] for step in TRACE["steps"]])
    for name in NAMES:
        steps = TRACE["steps"]
        want = read if name == "num_tokens" else np.array([step[name] for step in steps])
        got = np.array([line[name] for line in lines])
        deviation = np.abs(got - want) / (1 + np.abs(want))
        print(f"deviation {name} {deviation.max():.1e}")
        assert deviation.max() < 2e-5, (name, deviation)
    for name, norm in TRACE["final_norms"].items():
        assert abs(np.linalg.norm(weights_of(output)[name]) - norm) < 2e-5 * (1 + norm), name


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ids_of(rows=10, seed=0):
    rng = np.random.default_rng(seed)

    def draw():
        return rng.integers(0, 96, rng.integers(2, 8)).tolist()

    return [{"prompt_ids": draw(), "completion_ids": draw()} for _ in range(rows)]


QUICK = {"loss": "sft", "dropout": False, "schedule": "constant", "warmup_steps": 0}


@pytest.mark.parametrize("average", ["tokens", pytest.param("rows", marks=pytest.mark.slow)])
def test_what_the_mean_runs_over(average, tmp_path):
    path = write(tmp_path / "data.jsonl", *ids_of(4))
    assert small(tmp_path, **QUICK, average=average, steps=1, shuffle=False) == 0
    rows, _ = data.tokenize(data.read(path), None)
    batch = next(data.batches(rows, batch_size=4, shuffle=False, kl=False))
    scored = eqx.filter_jit(dpx.score_unpaired)(load(MODEL), batch)
    total, length = np.asarray(scored.completion, np.float64), np.asarray(scored.length)
    want = {"tokens": -total.sum() / length.sum(), "rows": -(total / length).mean()}
    assert abs(want["tokens"] - want["rows"]) > 1e-2
    assert abs(lines_of(tmp_path / "run")[0]["loss"] - want[average]) < 1e-5


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "data.jsonl", *ids_of())
    given = QUICK | {"dropout": True, "eval_fraction": 0.3, "metrics": ["entropy", "num_tokens"]}
    assert small(tmp_path / "whole", **given, steps=4) == 0
    assert small(tmp_path / "parts", **given, steps=2) == 0
    assert small(tmp_path / "parts", **given, steps=4, resume=True) == 0
    whole, parts = (tmp_path / name / "run" for name in ("whole", "parts"))
    assert same_weights(whole, parts)
    for name in ("metrics.jsonl", "eval.jsonl"):
        one, other = (lines_of(run, name) for run in (whole, parts))
        last = [{**lines[-1], "tokens_per_second": 0} for lines in (one, other)]
        assert last[0] == last[1]
    assert "num_tokens" in lines_of(whole)[-1]
    assert 0 <= lines_of(whole, "eval.jsonl")[-1]["eval/mean_token_accuracy"] <= 1
    # Another mean is another run.
    assert small(tmp_path / "parts", **given, steps=6, average="rows", resume=True) != 0


LABELLED = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "label": True}
PLAIN = {"prompt_ids": [1, 2], "completion_ids": [3, 4]}
PAIR = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}


@pytest.mark.parametrize(
    ("record", "settings", "error"),
    [
        (PLAIN, {"loss": "sigmoid"}, "`--loss sigmoid` needs pairs, and .* holds completion token"),
        (PLAIN, {"loss": "kto"}, "`--loss kto` needs a column `label`.*take `--loss sft` to learn"),
        (PLAIN, {"loss": ["bco", "sft"]}, "`--loss bco sft` needs a column `label`"),
        (LABELLED, {"loss": "sft"}, "has a column `label`. Choose .*`--where label=true --columns"),
        (PAIR, {"loss": "sft", "average": "tokens"}, "`--average` is for single completions"),
        (PAIR, {"loss": ["sft", "kto"]}, "needs single completions, and .* holds token ids"),
        (PLAIN, {"loss": "kto", "average": "rows"}, "`--average` is for `--loss sft` alone; got"),
        (PLAIN, {"loss": "sft", "reference": MODEL}, "uses no reference"),
    ],
)
def test_what_does_not_fit(record, settings, error, tmp_path, capsys):
    write(tmp_path / "data.jsonl", record)
    assert small(tmp_path, **settings) != 0
    message = capsys.readouterr().err
    assert re.search(error, message), message


def test_labels_choose_what_is_learned(tmp_path):
    bad = {**LABELLED, "completion_ids": [5, 6, 7], "label": False}
    good = [{**LABELLED, "completion_ids": [i, 4]} for i in range(4)]
    write(tmp_path / "data.jsonl", bad, *good)
    given = QUICK | {"where": "label=true", "columns": "label=", "steps": 1}
    assert small(tmp_path, **given) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["rows"] == 4


def test_the_loss_itself():
    """Desirable completions are learned, and undesirable ones are not, beside `kto` for example."""
    numbers = np.array([-3.0, -8.0, -2.0])
    label = np.array([True, True, False])
    scored = dpx.UnpairedLogProbs(numbers, label, None, np.array([3, 2, 0], np.int32))
    got = losses.sft(scored, None)
    assert np.allclose(got.loss, [1.0, 4.0, 0.0], rtol=1e-15)
    assert np.array_equal(got.reward, numbers)
    slopes = jax.grad(
        lambda x: losses.sft(eqx.tree_at(lambda s: s.completion, scored, x), None).loss.sum()
    )(jax.numpy.asarray(numbers))
    assert np.allclose(slopes, [-1 / 3, -1 / 2, 0], rtol=1e-15)
    with pytest.raises(ValueError, match=r"`sft` needs `policy\.length`.* `score_unpaired`"):
        losses.sft(dpx.UnpairedLogProbs(numbers, label), None)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A folder with a supervised run with adapters, as the page `docs/sft.md` makes it."""
    folder = tmp_path_factory.mktemp("taught")
    write(folder / "demonstrations.jsonl", *ids_of(8))
    preferences = [
        {"prompt_ids": r["prompt_ids"], "chosen_ids": r["completion_ids"], "rejected_ids": [7, 3]}
        for r in ids_of(4, seed=1)
    ]
    write(folder / "preferences.jsonl", *preferences)
    given = QUICK | {"data": folder / "demonstrations.jsonl", "output": folder / "sft"}
    with jax.numpy_dtype_promotion("standard"):
        assert small(folder, **given, lora_rank=4, learning_rate=0.05, steps=4) == 0
    return folder


WAYS = {
    "adapter": {"lora": "sft/adapter", "lora_reference": "adapter"},
    "base": {"lora": "sft/adapter", "lora_reference": "base"},
    "merged": {"model": "sft/model", "lora_rank": 4},
}


@pytest.mark.parametrize(
    "way", ["adapter", *(pytest.param(way, marks=pytest.mark.slow) for way in ("merged", "base"))]
)
def test_from_demonstrations_to_preferences(way, taught):
    """Which policy is the reference decides the first loss; the finished model has both runs."""
    paths = {n: taught / v if n in ("lora", "model") else v for n, v in WAYS[way].items()}
    given = QUICK | {"data": taught / "preferences.jsonl", "output": taught / way, "steps": 2}
    given |= {"loss": "sigmoid", "shuffle": False} | paths
    assert small(taught, **given) == 0
    first = lines_of(taught / way)[0]["loss"]

    rows, _ = data.tokenize(data.read(taught / "preferences.jsonl"), None)
    batch = next(data.batches(rows, batch_size=4, shuffle=False))
    policies = [load(taught / "sft" / "model"), load(MODEL)]
    after_sft, base = (eqx.filter_jit(dpx.score_pairs)(policy, batch) for policy in policies)
    want = float(losses.dpo(after_sft, base, beta=0.1).loss.mean()) if way == "base" else np.log(2)
    assert abs(first - want) < 1e-5
    assert way != "base" or abs(want - np.log(2)) > 1e-3, "the two references differ here"

    finished = load(taught / way / "model")
    start = load(MODEL if way != "merged" else taught / "sft" / "model")
    merged = merge_lora(load_lora(start, taught / way / "adapter"))
    for one, other in zip(*map(jax.tree.leaves, (finished, merged)), strict=True):
        assert np.abs(one - other).max() < 1e-5
