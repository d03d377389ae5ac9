"""Folders read and written: shards, tied and base-model names, dtypes, shardings, faults."""

import json
import os
import shutil
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from safetensors.numpy import load_file, save_file

from dpo_eqx import models

from .golden import FOLDER

LLAMA = FOLDER / "families" / "llama"
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
    "added_tokens": [{"id": 95, "content": "<end>"}],
}


@pytest.fixture
def folder(tmp_path):
    """A copy of a checkpoint, to be damaged."""
    return shutil.copytree(LLAMA, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def policy():
    return models.load(LLAMA)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_shards_and_index(policy, tmp_path):
    models.save(policy, tmp_path / "saved", max_shard_size=30_000)
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert files[:2] == ["config.json", "model-00001-of-00004.safetensors"]
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    sizes = [len(path.read_bytes()) for path in (tmp_path / "saved").glob("*.safetensors")]
    assert max(sizes) < 32_000
    assert 0 < sum(sizes) - index["metadata"]["total_size"] < 8_000
    assert index["weight_map"].keys() == load_file(LLAMA / "model.safetensors").keys()
    assert eqx.tree_equal(models.load(tmp_path / "saved"), policy)


def test_how_a_policy_runs_is_not_in_its_checkpoint(policy, tmp_path):
    other = models.load(LLAMA, remat=True, fused=False)
    assert (other.config.remat, other.config.fused) == (True, False)
    models.save(other, tmp_path / "saved")
    assert eqx.tree_equal(models.load(tmp_path / "saved"), policy)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_base_models_lack_the_prefix(name, tmp_path):
    folder = shutil.copytree(FOLDER / "families" / name, tmp_path / "base")
    want = models.load(folder)
    prefix = {"gpt2": "transformer.", "llama": "model."}[name]

    def edit(tensors):
        bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
        constants = {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)} if name == "gpt2" else {}
        return bare | constants

    edit_tensors(folder, edit)
    assert eqx.tree_equal(models.load(folder), want)


def test_tied_checkpoints_may_hold_the_unembedding(tmp_path):
    folder = shutil.copytree(FOLDER / "families" / "gemma2", tmp_path / "tied")
    want = models.load(folder)
    edit_tensors(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})
    assert eqx.tree_equal(models.load(folder), want)
    edit_tensors(folder, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + np.float32(1)})
    with pytest.raises(ValueError, match=r"`tie_word_embeddings` is true .* differs"):
        models.load(folder)


def test_dtypes(policy, folder, tmp_path):
    narrow = models.load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
    weight = policy.embedding.weight.astype(jnp.bfloat16)
    assert np.array_equal(narrow.embedding.weight, weight)
    models.save(narrow, tmp_path / "narrow")
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert eqx.tree_equal(models.load(tmp_path / "narrow"), narrow)


def test_layers_of_different_dtypes_share_the_wider(policy, folder):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: {**t, name: t[name].astype(np.float16)})
    loaded = models.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    up, want = loaded.layers.feed_forward.up.weight, policy.layers.feed_forward.up.weight
    assert np.array_equal(up[0], want[0].astype(jnp.float16).astype(jnp.float32))
    assert np.array_equal(up[1], want[1])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_device_reads_its_own_part(name):
    folder = FOLDER / "families" / name
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    read = []

    def sharding(path, leaf):
        read.append(path)
        if leaf.ndim < 2 or (path.startswith("layers") and leaf.ndim < 3):
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*[None] * (leaf.ndim - 2), "tensor", "fsdp"))

    sharded, whole = models.load(folder, sharding=sharding), models.load(folder)
    assert "layers.attention.query.weight" in read
    query = sharded.layers.attention.query.weight
    assert query.addressable_shards[0].data.shape == (2, 16, 8)
    assert eqx.tree_equal(jax.device_get(sharded), jax.device_get(whole))
    replicated = models.load(folder, sharding=NamedSharding(mesh, P()))
    assert query.shape == replicated.layers.attention.query.weight.addressable_shards[0].data.shape


def test_loaded_parameters_can_be_donated(folder):
    policy = models.load(folder)

    @eqx.filter_jit(donate="all")
    def step(policy):
        return jax.tree.map(lambda x: x * 2, policy)

    doubled = step(policy)
    assert policy.embedding.weight.is_deleted()
    again = models.load(folder)
    assert np.array_equal(doubled.embedding.weight, 2 * again.embedding.weight)


def test_tokenizer_travels(folder, tmp_path):
    files = {"tokenizer.json": json.dumps(TOKENIZER), "chat_template.jinja": "{{ hi }}"}
    for name, content in files.items():
        (folder / name).write_text(content)
    policy = eqx.filter_jit(lambda policy: policy)(models.load(folder))
    edit_config(folder, bos_token_id=17)
    models.save(policy, tmp_path / "saved")
    for name, content in files.items():
        assert (tmp_path / "saved" / name).read_text() == content
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["bos_token_id"] == 1
    models.save(policy, tmp_path / "bare", tokenizer_from=LLAMA)
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


def test_tokenizers_keep_policies_apart_in_a_jit_cache(policy, folder):
    step = eqx.filter_jit(lambda policy: policy)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    first = models.load(folder)
    (folder / "tokenizer.json").write_text(json.dumps({**TOKENIZER, "version": "2"}))
    second = models.load(folder)
    assert step(first).origin.files == first.origin.files != second.origin.files
    assert step(second).origin.files == second.origin.files
    # One without any fits both, as a reference may.
    assert jax.tree.structure(first) == jax.tree.structure(policy)
    assert jax.tree.structure(first) != jax.tree.structure(second)


def test_save_replaces_a_checkpoint_and_nothing_else(policy, tmp_path):
    saved = tmp_path / "saved"
    models.save(policy, saved, max_shard_size=30_000)
    (saved / "notes.md").write_text("mine")
    (saved / "logs").mkdir()
    models.save(policy, saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "logs",
        "model.safetensors",
        "notes.md",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_failed_save_leaves_the_old_folder(policy, tmp_path, monkeypatch):
    saved = tmp_path / "saved"
    models.save(policy, saved)
    before = (saved / "model.safetensors").read_bytes()

    def fail(*args, **settings):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        models.save(policy, saved)
    assert (saved / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("model.norm.weight"), r"missing: model\.norm\.weight, of shape \(32,\)"),
        (
            lambda t: {**t, "model.layers.2.x": np.zeros(3, np.float32)},
            r"extra: model\.layers\.2\.x, of shape \(3,\)",
        ),
        (
            lambda t: {**t, "lm_head.weight": np.zeros((95, 32), np.float32)},
            r"mis-shaped: lm_head\.weight should be \(96, 32\), is \(95, 32\)",
        ),
        (
            lambda t: {**t, "model.norm.weight": np.zeros(32, np.int8)},
            r"model\.norm\.weight is of dtype I8",
        ),
    ],
)
def test_wrong_tensors(folder, edit, message):
    edit_tensors(folder, edit)
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_truncated(folder):
    os.truncate(folder / "model.safetensors", 50_000)
    with pytest.raises(ValueError, match=r"model\.safetensors is no complete safetensors file"):
        models.load(folder)


def test_missing_and_false_shards(policy, tmp_path):
    models.save(policy, tmp_path / "saved", max_shard_size=30_000)
    index = tmp_path / "saved" / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.nothing"] = "model-00001-of-00004.safetensors"
    index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"'model\.nothing' is in model-00001.*; it is not"):
        models.load(tmp_path / "saved")
    del values["weight_map"]["model.nothing"]
    index.write_text(json.dumps(values))
    (tmp_path / "saved" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-.*\.safetensors, which"):
        models.load(tmp_path / "saved")


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: a pickle, which can run any code"):
        models.load(folder)


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder 'nowhere/at/all'"):
        models.load("nowhere/at/all")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs `model\.safetensors` or"):
        models.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"`config\.json` in .* is not JSON"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs `config\.json`"):
        models.load(folder)


def test_hub_names_go_to_the_hub(folder, monkeypatch):
    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    models.load("someone/llama")
    assert asked["name"] == "someone/llama"
    assert "*.bin" not in asked["allow_patterns"]

    def fail(name, **settings):
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"'someone/llama' is no local folder.*offline"):
        models.load("someone/llama")


@pytest.mark.parametrize("vocab", [{"a": 96}, [["a", 0.0]] * 97])
def test_vocabulary_smaller_than_the_tokenizer(folder, vocab):
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    with pytest.raises(ValueError, match=r"above every id of the tokenizer; it is 96, and 'a' has"):
        models.load(folder)


def test_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "dpo-eqx\[models\]"'):
        models.load(LLAMA)


def test_float64_needs_x64(folder):
    with jax.enable_x64(False), pytest.raises(ValueError, match="where `jax_enable_x64` is set"):
        models.load(folder, dtype="float64")
