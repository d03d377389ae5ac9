"""`train --reward-head`: the Bradley-Terry loss by hand, a checkpoint, and a run from it."""

import dataclasses
import json
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest

from dpo_eqx import data, models
from dpo_eqx.cli.settings.check import check
from dpo_eqx.cli.settings.settings import Settings

from .runs import GOLDEN, lines_of, same_weights, weights_of
from .small import MODEL, small, write_data

REWARDS = {"loss": "bradley_terry", "reward_head": True, "dropout": False, "steps": 3}


def rewards_of(model, batch):
    """The rewards of whole sequences, one at a time."""

    def one(prompt, completion):
        ids = np.concatenate([x.ids[x.mask] for x in (prompt, completion)])
        return run_model(model, np.pad(ids, (0, 32 - len(ids))), len(ids))

    run_model = eqx.filter_jit(lambda model, ids, length: model(ids, length))
    sides = (batch.chosen, batch.rejected)
    rows = [[jax.tree.map(lambda x, i=i: x[i], x) for x in (batch.prompt, *sides)] for i in (0, 1)]
    return np.array([[float(one(p, c)), float(one(p, r))] for p, c, r in rows])


def first_loss(model, path):
    """The Bradley-Terry loss of the first two pairs, from the rewards one by one."""
    rows, _ = data.tokenize(data.read(path), None)
    batch = next(data.batches(rows, batch_size=2, shuffle=False))
    rewards = rewards_of(model, batch)
    return np.log1p(np.exp(rewards[:, 1] - rewards[:, 0])).mean()


def test_a_reward_model_from_a_policy(tmp_path):
    assert small(tmp_path, **REWARDS, batch_size=2, shuffle=False) == 0
    run = tmp_path / "run"
    start = models.RewardModel(models.load(MODEL), key=jax.random.key(7))
    assert abs(lines_of(run)[0]["loss"] - first_loss(start, tmp_path / "data.jsonl")) < 1e-5
    assert lines_of(run)[-1]["loss"] != lines_of(run)[0]["loss"]

    config = json.loads((run / "model" / "config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert weights_of(run)["score.weight"].shape == (1, config["n_embd"])


@pytest.mark.slow
def test_a_run_from_a_reward_model_begins_with_its_head(tmp_path):
    assert small(tmp_path, **REWARDS, batch_size=2, shuffle=False) == 0
    run = tmp_path / "run"
    again = {**REWARDS, "model": run / "model", "output": tmp_path / "again", "steps": 1}
    assert small(tmp_path, **again, batch_size=2, shuffle=False, seed=1) == 0
    loss = first_loss(models.load(run / "model"), tmp_path / "data.jsonl")
    assert abs(lines_of(tmp_path / "again")[0]["loss"] - loss) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("start", ["policy", "reward model"])
def test_adapters_and_the_head_are_trained(tmp_path, start):
    if start == "reward model":
        models.save(models.RewardModel(models.load(MODEL), key=jax.random.key(1)), tmp_path / "m")
    base = MODEL if start == "policy" else tmp_path / "m"
    options = {**REWARDS, "model": base, "lora_rank": 2, "lora_modules_to_save": "^positions"}
    assert small(tmp_path, **options, save_every=2) == 0
    run, first = tmp_path / "run", models.load(base)
    loaded, merged = models.load_lora(first, run / "adapter"), models.load(run / "model")
    rows, _ = data.tokenize(data.read(tmp_path / "data.jsonl"), None)
    batch = next(data.batches(rows, batch_size=2))
    got, want = rewards_of(loaded, batch), rewards_of(merged, batch)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    # The head is trained in full, and what has no adapter is as it was.
    head = models.RewardModel(first, key=jax.random.key(7)) if start == "policy" else first
    assert np.abs(merged.head.weight - head.head.weight).max() > 1e-3
    assert eqx.tree_equal(merged.body.embedding, head.body.embedding)
    again = {**options, "output": tmp_path / "parts", "schedule": "constant", "warmup_steps": 0}
    for steps in (2, 3):
        assert small(tmp_path, **again | {"steps": steps, "resume": True}) == 0
    assert small(tmp_path, **again | {"output": tmp_path / "whole"}) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_run_from_adapters_of_peft_begins_with_their_head(tmp_path):
    # Written by PEFT for `AutoModelForSequenceClassification`, see `compare_peft.py`.
    adapter = GOLDEN / "models" / "peft_reward" / "gpt2"
    given = {**REWARDS, "lora": adapter, "batch_size": 2, "shuffle": False, "save_every": 0}
    assert small(tmp_path, **given) == 0
    loss = first_loss(models.load_lora(models.load(MODEL), adapter), tmp_path / "data.jsonl")
    lines = lines_of(tmp_path / "run")
    assert abs(lines[0]["loss"] - loss) < 1e-5
    assert lines[-1]["loss"] != lines[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["policy", "reward model"])
def test_two_runs_through_a_folder_of_adapters_are_one_run(tmp_path, start):
    """Two passes through the data, without an optimiser's state that the second run would lack."""
    base = GOLDEN / "models" / "families" / "llama"
    if start == "reward model":
        models.save(models.RewardModel(models.load(base), key=jax.random.key(1)), tmp_path / "m")
        base = tmp_path / "m"
    write_data(tmp_path / "data.jsonl", rows=8)
    plain = {"optimizer": "sgd", "schedule": "constant", "warmup_steps": 0, "shuffle": False}
    given = {**REWARDS, **plain, "model": base, "learning_rate": 0.1, "save_every": 0}
    runs = {
        "whole": {"steps": 4, "lora_rank": 2},
        "one": {"steps": 2, "lora_rank": 2},
        "two": {"steps": 2, "lora": tmp_path / "one" / "adapter", "seed": 8},
    }
    for name, more in runs.items():
        assert small(tmp_path, **{**given, **more, "output": tmp_path / name}) == 0
    whole, one, two = (lines_of(tmp_path / name) for name in runs)
    assert abs(two[-1]["loss"] - one[-1]["loss"]) > 1e-3
    for got, want in zip([*one, *two], whole, strict=True):
        assert abs(got["loss"] - want["loss"]) < 1e-6
    want, got, before = (weights_of(tmp_path / name) for name in ("whole", "two", "one"))
    for name in ("score.weight", "model.layers.0.mlp.up_proj.weight"):
        assert np.abs(want[name] - before[name]).max() > 1e-4, name
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_adapters_of_a_language_model_need_a_head(tmp_path, capsys):
    adapter = GOLDEN / "models" / "peft" / "gpt2"
    assert small(tmp_path, **REWARDS, lora=adapter) == 2
    assert "holds those of a language model, without a head." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    # A reward model has a head already, which is trained with them.
    start = models.RewardModel(models.load(MODEL), key=jax.random.key(1))
    models.save(start, tmp_path / "m")
    assert small(tmp_path, **REWARDS, lora=adapter, model=tmp_path / "m") == 0
    moved = models.load(tmp_path / "run" / "model").head.weight - start.head.weight
    assert 1e-3 < np.abs(moved).max() < 0.1


@pytest.mark.slow
def test_stopped_and_continued(tmp_path):
    constant = {**REWARDS, "schedule": "constant", "warmup_steps": 0}
    for name, parts in (("one", [4]), ("two", [2, 4])):
        for steps in parts:
            more = {"steps": steps, "resume": True, "output": tmp_path / name}
            assert small(tmp_path, **constant | more) == 0
    assert same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"reward_head": True}, "got `--loss sigmoid` with `--reward-head`"),
        ({"loss": ("bradley_terry",)}, "got `--loss bradley_terry` without `--reward-head`"),
        ({"loss": ("bradley_terry", "sft"), "reward_head": True}, "alone, the loss of reward"),
        (
            {"loss": ("bradley_terry",), "reward_head": True, "reference_free": True},
            "contradict each other",
        ),
    ],
)
def test_bad_input(changed, words):
    settings = Settings(model="m", data=("d",), output=Path("o"))
    with pytest.raises(ValueError, match=words):
        check(dataclasses.replace(settings, **changed))
