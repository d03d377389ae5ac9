"""Modules that are trained whole beside adapters: `modules_to_save`."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import dpo_eqx as dpx
from dpo_eqx import losses, models
from dpo_eqx.models._checkpoint.folder import ADAPTER_CONFIG

from .golden import FOLDER, call, ragged_batch, shaken

IDS = np.arange(3, 15)
KEY = jax.random.key(0)


def with_modules(base, pattern="^(embedding|head)", **given):
    return models.add_lora(base, rank=2, target="query", modules_to_save=pattern, key=KEY, **given)


@pytest.fixture(scope="module")
def base():
    return models.load(FOLDER / "families" / "llama")


def test_trains_a_copy_and_keeps_the_original(base):
    policy = with_modules(base)
    assert np.array_equal(call(policy, IDS), call(base, IDS))
    chosen = models.lora_filter(policy)
    assert sum(jax.tree.leaves(chosen)) == 4
    assert chosen.embedding.module.weight
    assert not chosen.embedding.original.weight
    moved = shaken(policy)
    assert np.abs(moved.unembedding - base.unembedding).max() > 0.1
    view = models.without_lora(moved)
    assert jax.tree.structure(view) == jax.tree.structure(base)
    assert all(map(lambda x, y: x is y, jax.tree.leaves(view), jax.tree.leaves(base)))
    merged = models.merge_lora(moved)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert np.array_equal(merged.embedding.weight, moved.embedding.weight)
    assert np.abs(call(merged, IDS) - call(moved, IDS)).max() < 1e-5


def test_in_float32_on_a_narrow_base():
    table = eqx.nn.Embedding(5, 4, key=KEY, dtype=jnp.bfloat16)
    layers = {"table": table, "query": eqx.nn.Linear(4, 4, key=KEY, dtype=jnp.bfloat16)}
    policy = with_modules(layers, "table")
    assert policy["table"].weight.dtype == jnp.float32
    assert models.merge_lora(policy)["table"].weight.dtype == jnp.bfloat16
    assert policy["table"](jnp.asarray(3)).shape == (4,)


def test_what_is_pinned_keeps_the_modules():
    layers = {"norm": eqx.nn.LayerNorm(4), "query": eqx.nn.Linear(4, 4, key=KEY)}
    start = shaken(with_modules(layers, "norm"))
    pinned = models.pin_lora(start)
    norm = pinned["norm"]
    moved = {**pinned, "norm": norm.with_trained(tuple(x + 1 for x in norm.trained))}
    x = jnp.arange(4.0)
    assert np.array_equal(models.pinned_lora(moved)["norm"](x), start["norm"](x))
    assert np.abs(moved["norm"](x) - start["norm"](x)).max() > 0.1


def test_files_have_the_same_bits(base, tmp_path):
    policy = shaken(with_modules(base, "^(embedding|head|norm|layers.attention_norm)"))
    models.save_lora(policy, tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert config["modules_to_save"] == ["embed_tokens", "input_layernorm", "lm_head", "model.norm"]
    again = models.load_lora(base, tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(policy)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(policy)))
    alone = eqx.filter(policy, models.lora_filter(policy))
    models.save_lora(alone, tmp_path / "alone")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_norms_of_each_head_are_one_module(tmp_path):
    """As in StableLM: the file has a tensor for each head, and one name for all of them."""
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 10, "intermediate_size": 8, "num_hidden_layers": 2}
    options = {"qk_layernorm": True, "partial_rotary_factor": 0.5}
    config = models.read_config({"model_type": "stablelm", **options, **sizes})
    base = models.Transformer(config, key=KEY)
    for names in ([], ["k_layernorm", "q_layernorm"]):
        pattern = "(query|key)_norm" if names else None
        policy = shaken(models.add_lora(base, rank=2, target="", modules_to_save=pattern, key=KEY))
        models.save_lora(policy, tmp_path)
        written = json.loads((tmp_path / ADAPTER_CONFIG).read_text())["modules_to_save"] or []
        assert written == names
        assert eqx.tree_equal(models.load_lora(base, tmp_path), policy)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    norms = [name for name in tensors if name.endswith("k_layernorm.norms.1.weight")]
    assert len(norms) == 2
    of_layer_1 = policy.layers.attention.key_norm.weight[1, 1]
    assert np.array_equal(tensors[max(norms)], of_layer_1)


def test_files_of_another_module_have_the_same_bits(tmp_path):
    layers = {"norm": eqx.nn.LayerNorm(4), "query": eqx.nn.Linear(4, 4, key=KEY)}
    policy = shaken(with_modules(layers, "norm"))
    models.save_lora(policy, tmp_path)
    for start in (layers, with_modules(layers, "norm")):
        again = models.load_lora(start, tmp_path)
        assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(policy)))
    with pytest.raises(ValueError, match=r"no such modules at \['norm'\]"):
        models.load_lora({"query": layers["query"]}, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ensure_weight_tying": False}, r"unties the embedding .* `ensure_weight_tying=True`"),
        ({"modules_to_save": ["score"]}, r"must name modules .* got \['score'\], and `policy` has"),
        ({"modules_to_save": ["0.input_layernorm"]}, "all layers of 'layers.attention_norm' or no"),
        ({"modules_to_save": None}, "extra: base_model.model.lm_head.weight|differs from the"),
    ],
)
def test_files_that_do_not_fit(change, message, tmp_path):
    tied = models.load(FOLDER / "families" / "qwen2-tied")
    folder = FOLDER / "peft" / "modules-tied"
    config = json.loads((folder / ADAPTER_CONFIG).read_text()) | change
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=message):
        models.load_lora(tied, tmp_path)


def test_errors(base):
    with pytest.raises(ValueError, match=r"'mlp' matches none. There are: embedding.weight, head"):
        with_modules(base, "mlp")
    with pytest.raises(ValueError, match=r"must match different layers; both match head\."):
        models.add_lora(base, rank=2, target="query|head", modules_to_save="head", key=KEY)


@pytest.mark.slow
def test_a_step_starts_at_log_2_and_leaves_the_originals(base):
    policy = with_modules(base)
    trainable, optimizer = models.lora_filter(policy), optax.sgd(0.1)
    step = dpx.make_step(
        losses.dpo, optimizer, trainable=trainable, reference_of=models.without_lora
    )
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    trained, _, metrics = eqx.filter_jit(step)(policy, opt_state, ragged_batch(0))
    assert abs(metrics["loss"] - np.log(2)) < 1e-6
    assert np.any(trained.embedding.weight != base.embedding.weight)
    assert np.any(trained.head.weight != base.head.weight)
    view = models.without_lora(trained)
    assert all(map(np.array_equal, jax.tree.leaves(view), jax.tree.leaves(base)))
