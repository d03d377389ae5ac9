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

from .runs import lines_of, same_weights, weights_of
from .small import MODEL, small

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
        ({"loss": ("bradley_terry",), "reward_head": True, "lora": "a"}, "contradict each other"),
    ],
)
def test_bad_input(changed, words):
    settings = Settings(model="m", data=("d",), output=Path("o"))
    with pytest.raises(ValueError, match=words):
        check(dataclasses.replace(settings, **changed))
