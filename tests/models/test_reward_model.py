"""Reward models: scores of `transformers`, training by `bradley_terry`, and their checkpoints."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import dpo_eqx as dpx
from dpo_eqx import losses, models

from .golden import FOLDER, ragged_batch

REWARD_MODELS = FOLDER / "reward_models"


@pytest.fixture(scope="module")
def reward_model():
    return models.load(REWARD_MODELS / "gemma2", dtype=jnp.float64)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_are_those_of_transformers(name):
    values = np.load(REWARD_MODELS / name / "expected.npz")
    reward_model = models.load(REWARD_MODELS / name)
    assert isinstance(reward_model, models.RewardModel)
    # What follows the last real token has no influence.
    tokens = np.where(np.arange(40) < values["length"][:, None], values["tokens"], 7)
    got = jax.vmap(reward_model)(tokens, values["length"])
    np.testing.assert_allclose(got, values["scores"], rtol=0, atol=5e-6 * np.abs(got).max())


def test_pairs_are_scored_as_single_sequences(reward_model):
    # Ragged prompts, unscored tokens within completions, and an empty completion.
    batch = ragged_batch(0)
    got = eqx.filter_jit(models.score_rewards)(reward_model, batch)
    one = eqx.filter_jit(reward_model)
    for row in range(batch.pairs):
        prompt = batch.prompt.ids[row][batch.prompt.mask[row]]
        for name in ("chosen", "rejected"):
            mask, ids = getattr(batch, name).mask[row], getattr(batch, name).ids[row]
            size = np.flatnonzero(mask)[-1] + 1 if mask.any() else 0
            sequence = np.concatenate([prompt, ids[:size]])
            padded = np.pad(sequence, (0, 20 - len(sequence)))
            want = one(padded, jnp.asarray(len(sequence)))
            np.testing.assert_allclose(getattr(got, name)[row], want, rtol=1e-10)


@pytest.fixture(scope="module")
def trained(reward_model):
    """A step with the whole batch, and one with three microbatches."""
    policy = models.load(FOLDER / "families" / "llama", dtype=jnp.float64)
    start = models.RewardModel(policy, key=jax.random.key(0))
    assert start.body.head is None
    batch = ragged_batch(1)
    margin = {"margin": jnp.linspace(0, 1, 3)}
    batch = eqx.tree_at(lambda b: b.per_pair, batch, margin, is_leaf=lambda x: x is None)
    optimizer = optax.sgd(0.1)

    def run(microbatches):
        step = dpx.make_step(
            losses.bradley_terry,
            optimizer,
            score=models.score_rewards,
            microbatches=microbatches,
        )
        opt_state = optimizer.init(eqx.filter(start, eqx.is_array))
        return eqx.filter_jit(step)(start, opt_state, batch)

    return start, batch, run(1), run(3)


@pytest.mark.slow
def test_microbatches_train_what_the_whole_batch_trains(trained):
    start, batch, (whole, _, metrics), (parts, _, _) = trained
    for x, y in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        if eqx.is_array(x):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)
    rewards = models.score_rewards(start, batch)
    z = np.asarray(rewards.chosen - rewards.rejected) - np.linspace(0, 1, 3)
    np.testing.assert_allclose(metrics["loss"], np.logaddexp(0, -z).mean(), rtol=1e-10)
    after = models.score_rewards(whole, batch)
    assert losses.bradley_terry(after).loss.mean() < losses.bradley_terry(rewards).loss.mean()


@pytest.mark.slow
def test_a_trained_one_is_saved_and_loaded(trained, tmp_path):
    _, batch, (whole, _, _), _ = trained
    models.save(whole, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"}
    again = models.load(tmp_path)
    assert eqx.tree_equal(eqx.filter(whole, eqx.is_array), eqx.filter(again, eqx.is_array))
    got, want = (models.score_rewards(model, batch).chosen for model in (again, whole))
    np.testing.assert_array_equal(got, want)


def test_the_body_may_be_quantised():
    reward_model = models.load(REWARD_MODELS / "llama", quantize="int8")
    values = np.load(REWARD_MODELS / "llama" / "expected.npz")
    got = jax.vmap(reward_model)(values["tokens"], values["length"])
    # One or two per cent, as of logits.
    np.testing.assert_allclose(got, values["scores"], atol=0.05)
    assert not isinstance(reward_model.head, models.Quantized)


def test_an_adapter_of_peft_makes_a_reward_model(tmp_path):
    # Written by PEFT 0.21, see `compare_peft.py`. It also has the embedding of positions.
    adapter, base = FOLDER / "peft_reward" / "gpt2", models.load(FOLDER / "families" / "gpt2")
    ids = np.load(FOLDER / "families" / "gpt2" / "expected.npz")["ids"][0, :12].astype(int)
    loaded = models.load_lora(base, adapter)
    assert isinstance(loaded, models.RewardModel)
    # A shared buffer could not be donated.
    trained, original = (x.weight.unsafe_buffer_pointer() for x in (loaded.head, loaded.head.base))
    assert trained != original
    got = eqx.filter_jit(loaded)(ids)
    # 0.09 apart without $A$ and $B$.
    np.testing.assert_allclose(got, np.load(adapter / "logits.npy")[0], rtol=0, atol=1e-6)

    models.save_lora(loaded, tmp_path, base="gpt2")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    names = [set(load_file(x / "adapter_model.safetensors")) for x in (tmp_path, adapter)]
    assert names[0] == names[1]
    start = models.RewardModel(base, key=jax.random.key(0))
    again = models.load_lora(start, tmp_path)
    assert eqx.tree_equal(again.head.original, start.head)
    found = (eqx.filter(x, models.lora_filter(x)) for x in (again, loaded))
    assert eqx.tree_equal(*found)


def test_an_adapter_of_several_labels_is_refused(tmp_path):
    source = FOLDER / "peft_reward" / "gpt2"
    tensors = load_file(source / "adapter_model.safetensors")
    name = "base_model.model.score.weight"
    tensors[name] = np.concatenate([tensors[name]] * 3)
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"one label, shape \(1, 32\); it has shape \(3, 32\)"):
        models.load_lora(models.load(FOLDER / "families" / "gpt2"), tmp_path)


def test_errors(tmp_path):
    source = REWARD_MODELS / "llama"
    tensors = load_file(source / "model.safetensors")
    tensors["score.weight"] = np.zeros((3, 32), np.float32)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"one label, shape \(1, width\); it has shape \(3, 32\)"):
        models.load(tmp_path)
    del tensors["score.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="there is none"):
        models.load(tmp_path)


def test_averages_of_rewards_are_refused(reward_model):
    rewards = models.score_rewards(reward_model, ragged_batch(0))
    with pytest.raises(ValueError, match=r"needs `policy\.chosen_length`"):
        losses.simpo(rewards, None)


def test_families_without_a_class_of_reward_models_are_not_saved(tmp_path):
    config = models.Config(vocab=8, width=8, layers=1, heads=2, family="granite")
    policy = models.Transformer(config, key=jax.random.key(0))
    reward_model = models.RewardModel(policy, key=jax.random.key(1))
    with pytest.raises(ValueError, match="'granite', for which `transformers` has no class"):
        models.save(reward_model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
