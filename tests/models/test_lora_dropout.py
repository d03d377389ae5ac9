"""Dropout of adapters: on their inputs, in training only, and the same however a batch is split."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models
from dpo_eqx.models._checkpoint.folder import ADAPTER_CONFIG, CONFIG

from .golden import FOLDER, Perceptron, ragged_batch, shaken

IDS = np.arange(3, 15)
KEY = jax.random.key(5)


def with_dropout(base, rate=0.5, **given):
    return shaken(models.add_lora(base, rank=2, dropout=rate, key=jax.random.key(0), **given))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that has dropout of its own, everywhere."""
    folder = tmp_path_factory.mktemp("gpt2") / "model"
    shutil.copytree(FOLDER / "families" / "gpt2", folder)
    config = json.loads((folder / CONFIG).read_text())
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.25)
    (folder / CONFIG).write_text(json.dumps(config | rates))
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return models.load(folder, dropout=False)


@eqx.filter_jit
def call(policy, ids, key=None):
    return policy(ids, key=key)


def test_only_the_adapter_reads_a_dropped_input():
    rng = np.random.default_rng(0)
    layer = eqx.nn.Linear(6, 4, key=KEY, dtype=jnp.float64)
    lora = with_dropout(layer, 0.25, alpha=6)
    x = rng.normal(size=6)
    kept = np.asarray(jax.random.bernoulli(KEY, 0.75, (6,)))
    assert 0 < kept.sum() < 6
    term = np.asarray(lora.up) @ (np.asarray(lora.down) @ np.where(kept, x / 0.75, 0))
    want = np.asarray(layer.weight) @ x + np.asarray(layer.bias) + 3 * term
    assert np.abs(lora(jnp.asarray(x), key=KEY) - want).max() < 1e-12
    assert np.abs(lora.with_key(KEY)(jnp.asarray(x)) - want).max() < 1e-12
    assert np.abs(lora(jnp.asarray(x)) - want).max() > 1e-3


def test_without_a_key_nothing_is_dropped(base):
    policy, plain = with_dropout(base), with_dropout(base, 0.0)
    assert np.array_equal(call(policy, IDS), call(plain, IDS))
    assert np.array_equal(call(plain, IDS, KEY), call(plain, IDS)), "the model's own dropout is off"
    assert np.abs(call(policy, IDS, KEY) - call(policy, IDS)).max() > 1e-3
    assert np.abs(call(policy, IDS, KEY) - call(policy, IDS, jax.random.key(6))).max() > 1e-3


def test_the_models_own_dropout_stays_what_it_was(folder):
    """Adapters with a dropout that drops nothing leave the draws of the model as they are."""
    own = models.load(folder)
    fresh = models.add_lora(own, rank=2, dropout=0.5, key=KEY)  # $B$ is zero
    assert np.array_equal(call(fresh, IDS, KEY), call(own, IDS, KEY))
    assert not np.array_equal(call(own, IDS, KEY), call(own, IDS))


def test_dropout_that_is_off_is_saved(base, tmp_path):
    models.save(base, tmp_path / "saved")
    again = models.load(tmp_path / "saved").config
    rates = again.residual_dropout, again.embedding_dropout, again.attention_dropout
    assert rates == (0.25, 0.25, 0.25)


def test_each_adapter_of_each_layer_has_its_own_key(base):
    attention = models.keyed_lora(with_dropout(base), KEY).layers.attention
    keys = [layer.key for layer in (attention.query, attention.key, attention.output)]
    data = np.concatenate([jax.random.key_data(key) for key in keys])
    assert len(data) == 3 * base.config.layers
    assert len(np.unique(data, axis=0)) == len(data)
    assert models.keyed_lora(base, KEY) is base
    policy = with_dropout(base)
    assert models.keyed_lora(policy, None) is policy


@pytest.mark.slow
def test_a_pair_draws_the_same_in_every_batch(base):
    policy, batch = with_dropout(base), ragged_batch(0)
    keys = jax.random.split(KEY, 3)
    score = eqx.filter_jit(dpx.score_pairs)
    together = score(policy, batch, key=keys)
    alone = score(policy, jax.tree.map(lambda x: x[1:2], batch), key=keys[1:2])
    assert np.abs(alone.chosen - together.chosen[1:2]).max() < 1e-5
    other = score(policy, jax.tree.map(lambda x: x[1:2], batch), key=keys[:1])
    assert np.abs(other.chosen - together.chosen[1:2]).max() > 1e-3


@pytest.mark.slow
def test_microbatches_draw_what_the_whole_batch_draws(base):
    policy = with_dropout(base)
    grads = [
        eqx.filter_jit(
            dpx.make_grad(
                losses.dpo,
                trainable=models.lora_filter(policy),
                reference_of=models.without_lora,
                microbatches=parts,
                compute_dtype=jnp.float64,
            )
        )
        for parts in (1, 3)
    ]
    (whole, metrics), (split, _) = (grad(policy, ragged_batch(0), key=KEY) for grad in grads)
    for one, other in zip(*map(jax.tree.leaves, (whole, split)), strict=True):
        assert np.abs(one - other).max() < 1e-6 * np.abs(one).max()
    _, still = grads[0](policy, ragged_batch(0))
    assert abs(metrics["loss"] - still["loss"]) > 1e-6


def test_another_module_keys_its_adapters():
    table = jax.random.normal(KEY, (7, 5), jnp.float32)
    plain = Perceptron(table, eqx.nn.MLP(5, 7, 6, 2, key=KEY, dtype=jnp.float32))
    model = with_dropout(plain, target="layers")

    policy = dpx.adapt(model, lambda model, ids, key: models.keyed_lora(model, key)(ids))
    ids = jnp.arange(7)
    assert np.array_equal(policy(ids), model(ids))
    assert np.abs(policy(ids, key=KEY) - model(ids)).max() > 1e-3


@pytest.mark.parametrize("rate", [0.0, 0.125])
def test_files_keep_it(base, rate, tmp_path):
    policy = with_dropout(base, rate)
    models.save_lora(policy, tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["lora_dropout"] == rate
    again = models.load_lora(base, tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(policy)
    other = models.load_lora(base, tmp_path, dropout=0.5)
    assert other.layers.attention.query.dropout == 0.5


def test_files_of_another_module_keep_it(tmp_path):
    layers = {"a": eqx.nn.Linear(6, 4, key=KEY, dtype=jnp.float32)}
    policy = with_dropout(layers, 0.125, rank_stabilised=True)
    models.save_lora(policy, tmp_path)
    assert jax.tree.structure(models.load_lora(layers, tmp_path)) == jax.tree.structure(policy)
    assert models.load_lora(layers, tmp_path, dropout=0.0)["a"].dropout == 0


def test_the_unembedding_has_none():
    phi = models.load(FOLDER / "families" / "phi")
    with pytest.raises(ValueError, match=r"`dropout` must be 0 .* `target` with 'head'. Leave it"):
        models.add_lora(phi, rank=2, target="", dropout=0.1, key=KEY)
    # PEFT wrote this adapter, with a `lora_dropout` of 0.1.
    loaded = models.load_lora(phi, FOLDER / "peft" / "phi")
    assert loaded.head.dropout == 0
    assert loaded.layers.attention.output.dropout == 0.1


def test_errors(base, tmp_path):
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\); got "):
            models.add_lora(base, rank=2, dropout=rate, key=KEY)
        with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\); got "):
            models.load_lora(base, FOLDER / "peft" / "gpt2", dropout=rate)
