"""Adapters and quantised models in `dpo-eqx train`: what is written, gone on from, and refused."""

import json
import re
import shutil

import equinox as eqx
import jax
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, models

from .runs import lines_of, weights_of
from .small import MODEL, small

QUICK = {
    "dropout": False,
    "steps": 2,
    "save_every": 0,
    "report": False,
    "schedule": "constant",
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run with new adapters on a quantised model."""
    folder = tmp_path_factory.mktemp("first")
    given = {"lora_rank": 2, "lora_target": "attention", "quantize": "nf4"}
    with jax.numpy_dtype_promotion("standard"):
        assert small(folder, **given, **QUICK) == 0
    return folder


score = eqx.filter_jit(dpx.score_pairs)


def log_probs(policy, folder):
    """Of the chosen answers of the first batch, as a run that does not shuffle logs them."""
    rows, _ = data.tokenize(data.read(folder / "data.jsonl"), None)
    batch = next(data.batches(rows, batch_size=4, shuffle=False))
    return float(score(policy, batch).chosen.mean())


@pytest.mark.slow
def test_adapter_and_model_are_the_same_policy(first):
    run = first / "run"
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(MODEL)
    base = models.load(MODEL, quantize="nf4")
    policy = models.load_lora(base, run / "adapter")
    merged, model = models.merge_lora(policy), models.load(run / "model")
    ours, theirs = (each.layers.attention.query.weight for each in (merged, model))
    assert np.abs(ours - theirs).max() < 1e-6
    # Not the weights that were read, but those that adapters were trained on.
    assert np.array_equal(base.layers.feed_forward.up.weight, model.layers.feed_forward.up.weight)
    assert weights_of(run)["transformer.h.0.mlp.c_fc.weight"].dtype == np.float32
    assert abs(lines_of(run)[0]["loss"] - np.log(2)) < 1e-6


@pytest.mark.parametrize(
    "which", [pytest.param(n, marks=pytest.mark.slow) for n in ("adapter", "base")]
)
def test_going_on_from_an_adapter(first, tmp_path, which, capsys):
    adapter = first / "run" / "adapter"
    given = {"lora": adapter, "lora_reference": which, "quantize": "nf4", "shuffle": False}
    shutil.copy(first / "data.jsonl", tmp_path)
    assert small(tmp_path, **QUICK, **given) == 0
    line = lines_of(tmp_path / "run")[0]
    base = models.load(MODEL, quantize="nf4")
    start = models.load_lora(base, adapter)
    ours, theirs = log_probs(start, tmp_path), log_probs(base, tmp_path)
    assert abs(line["logps/chosen"] - ours) < 1e-3
    want = 0.1 * (ours - (theirs if which == "base" else ours))
    assert abs(line["rewards/chosen"] - want) < 1e-4
    assert (abs(want) > 1e-3) == (which == "base")
    assert (abs(line["loss"] - np.log(2)) < 1e-6) == (which == "adapter")
    words = {"base": "without its adapters", "adapter": "with its adapters as they are now"}
    said = capsys.readouterr().out
    assert f"reference: the model {words[which]}" in said
    whole = sum(x.size for x in jax.tree.leaves(models.dequantize(start)))
    assert f"{whole:,} parameters" in said, "what is pinned is counted once"
    # The reference stays, and the policy moves.
    assert abs(lines_of(tmp_path / "run")[-1]["rewards/chosen"]) > 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora": "x", "lora_rank": 2}, "`--lora` and `--lora-rank` contradict each other"),
        ({"lora": "x", "lora_alpha": 2.0}, "`--lora` and `--lora-alpha` contradict"),
        ({"lora": "x", "sync_reference_every": 2}, "`--sync-reference-every` contradict"),
        (
            {"lora": "x", "lora_reference": "base", "reference": "r"},
            "`--lora-reference` and `--reference` contradict",
        ),
        ({"lora_reference": "base"}, "`--lora-reference` only applies if .* give `--lora` too"),
        ({"quantize": "int8"}, "`--quantize` is for a frozen model, .* `--lora-rank` or `--lora`"),
        ({"lora": "nowhere"}, "there is no folder 'nowhere'"),
    ],
)
def test_what_does_not_go_together(tmp_path, capsys, given, message):
    assert small(tmp_path, **QUICK, **given) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_which_reference_must_be_said(first, tmp_path, capsys):
    adapter = first / "run" / "adapter"
    assert small(tmp_path, lora=adapter, **QUICK) == 2
    assert "`--lora-reference` must be given with `--lora`" in capsys.readouterr().err
    assert small(tmp_path, lora=adapter, lora_reference="base", loss="simpo", **QUICK) == 2
    assert "`--lora-reference` is given, but `--loss simpo` uses no" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
