"""Folders read and written: shards, tied and base-model names, dtypes, shardings, faults."""

import dataclasses
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


def test_a_whole_file_goes_before_an_index(policy, tmp_path):
    """As in `transformers`, where shards of another policy are left beside it."""
    zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros_like(x)), policy)
    models.save(zeros, tmp_path / "saved", max_shard_size=30_000)
    shutil.copy(LLAMA / "model.safetensors", tmp_path / "saved")
    assert eqx.tree_equal(models.load(tmp_path / "saved"), policy)


def test_a_tensor_in_two_shards_is_read_from_where_the_index_says(policy, tmp_path):
    models.save(policy, tmp_path / "saved", max_shard_size=30_000)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    name = "model.layers.0.mlp.down_proj.weight"
    # The order in which they are read: stale ones come before and after it.
    shards = list(dict.fromkeys(index["weight_map"].values()))
    own = index["weight_map"][name]
    assert 0 < shards.index(own) < len(shards) - 1
    for shard in (shards[0], shards[-1]):
        tensors = load_file(tmp_path / "saved" / shard)
        tensors[name] = np.zeros((32, 64), np.float32)
        save_file(tensors, tmp_path / "saved" / shard, metadata={"format": "pt"})
    assert eqx.tree_equal(models.load(tmp_path / "saved"), policy)


def test_how_a_policy_runs_is_not_in_its_checkpoint(policy, tmp_path):
    other = models.load(LLAMA, remat=True, unroll=True, fused=False)
    assert (other.config.remat, other.config.unroll, other.config.fused) == (True, True, False)
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


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_tied_checkpoints_may_hold_the_unembedding_alone(name, tmp_path):
    folder = shutil.copytree(FOLDER / "families" / name, tmp_path / "tied")
    want = models.load(folder)
    embedding = {"gemma2": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[name]
    edit_tensors(folder, lambda t: {**without(embedding)(t), "lm_head.weight": t[embedding]})
    assert eqx.tree_equal(models.load(folder), want)


def test_an_unembedding_that_differs_is_not_tied(tmp_path):
    """As in `transformers`, which warns too."""
    folder = shutil.copytree(FOLDER / "families" / "gemma2", tmp_path / "tied")
    tied = models.load(folder)
    other = np.asarray(tied.embedding.weight) + np.float32(1)
    edit_tensors(folder, lambda t: {**t, "lm_head.weight": other})
    with pytest.warns(UserWarning, match=r"`tie_word_embeddings` is true .* differs .* set it to"):
        policy = models.load(folder)
    assert np.array_equal(policy.unembedding, other)
    assert np.array_equal(policy.embedding.weight, tied.embedding.weight)
    models.save(policy, tmp_path / "saved")
    assert eqx.tree_equal(models.load(tmp_path / "saved"), policy)


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


TRAVELS = [
    *("additional_chat_templates/tool_use.jinja", "chat_template.json", "merges.txt"),
    *("tokenizer.model", "tokenizer.model.v3", "tekken.json", "sentencepiece.bpe.model"),
    *("qwen.tiktoken", "tokenizer.4.0.0.json", "generation_config.json"),
]
STAYS = {
    "pytorch_model.bin": b"weights",
    "training_args.bin": b"settings",
    "optimizer.pt": b"moments",
    "other.model": b"",
    "spiece.model": b"\x80\x02a pickle",
    "spm_char.model": b"PK\x03\x04an archive of one",
    "additional_chat_templates/notes.md": b"",
    "modeling_llama.py": b"",
}


def test_all_files_of_the_tokenizer_travel_and_no_others(folder, tmp_path):
    (folder / "additional_chat_templates").mkdir()
    for name in TRAVELS:
        (folder / name).write_bytes(b"{}")
    for name, content in STAYS.items():
        (folder / name).write_bytes(content)
    policy = models.load(folder)
    assert sorted(policy.origin.files) == sorted(TRAVELS)
    models.save(policy, tmp_path / "saved")
    saved = {path for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    names = {path.relative_to(tmp_path / "saved").as_posix() for path in saved}
    assert names == {*TRAVELS, "config.json", "model.safetensors"}
    assert eqx.tree_equal(models.load(tmp_path / "saved"), policy)
    # Those of another tokenizer do not stay beside it.
    models.save(policy, tmp_path / "saved", tokenizer_from=LLAMA)
    assert not (tmp_path / "saved" / "additional_chat_templates").exists()


@pytest.mark.parametrize("own", [None, '{"eos_token_id": 3}'])
def test_generation_settings_stay_those_of_the_policy(own, folder, tmp_path):
    """The other tokenizer's folder is that of another model, or has no such file."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    if own is None:
        (other / "generation_config.json").write_text('{"eos_token_id": 4}')
    else:
        (folder / "generation_config.json").write_text(own)
    models.save(models.load(folder), tmp_path / "saved", tokenizer_from=other)
    path = tmp_path / "saved" / "generation_config.json"
    assert (path.read_text() if path.exists() else None) == own
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"


def test_a_policy_prints_no_tokenizer(folder):
    tokens = {f"<token {i}>": i for i in range(90)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}) + " " * 10**6)
    policy = models.load(folder)
    for text in (repr(policy), str(policy), eqx.tree_pformat(policy)):
        assert len(text) < 4000
        assert "<token" not in text
        assert "Origin(1 files, 1,00" in text.replace("\n", "")
    assert repr(models.load(LLAMA).origin) == "Origin()"


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
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
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
    for number in (2, 3):
        (tmp_path / "saved" / f"model-0000{number}-of-00004.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names model-00002-.*, model-00003-.*, which are"):
        models.load(tmp_path / "saved")
    for wrong in ({}, {"weight_map": None}, {"weight_map": {"model.norm.weight": 1}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"`weight_map` of model.safetensors.index.json in"):
            models.load(tmp_path / "saved")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    with pytest.raises(
        ValueError, match=r"name files in the same folder; it says that 'model.norm"
    ):
        models.load(tmp_path / "saved")
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is none in .*, only model-00001-of-"):
        models.load(tmp_path / "saved")


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: a pickle, which can run any code"):
        models.load(folder)


def test_errors_of_a_configuration_name_its_file(folder):
    edit_config(folder, hidden_size="32", rms_norm_eps=None)
    message = (
        r"checkpoint/config.json cannot be read. `hidden_size` in config.json must be a positive "
        r"integer; got '32'; `rms_norm_eps` in config.json must be a number of at least 0; got None"
    )
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_keys_that_are_read_are_written_anew(tmp_path):
    """A file's `layer_types` must not outlive the windows that it was read as."""
    folder = shutil.copytree(FOLDER / "families" / "mistral-sliding", tmp_path / "mixed")
    edit_config(folder, layer_types=["sliding_attention", "full_attention"])
    policy = models.load(folder)
    assert policy.config.windows == (12, None)
    models.save(policy, tmp_path / "saved")
    assert eqx.tree_equal(models.load(tmp_path / "saved"), policy)
    whole = dataclasses.replace(policy.config, windows=(None, None))
    models.save(_with_config(policy, whole), folder)
    assert models.load(folder).config.windows == (None, None)


def _with_config(policy, config):
    like = eqx.filter_eval_shape(
        models.Transformer, config, key=jax.random.key(0), origin=policy.origin
    )
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(policy))


def test_save_of_another_module(tmp_path):
    with pytest.raises(ValueError, match=r"must be a `models.Transformer`.*got MLP.*`eqx.tree_ser"):
        models.save(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), tmp_path / "saved")


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
    with pytest.raises(FileNotFoundError, match=r"'someone/llama' is not a local folder.*offline"):
        models.load("someone/llama")


@pytest.mark.parametrize("vocab", [{"a": 96}, [["a", 0.0]] * 97])
def test_vocabulary_smaller_than_the_tokenizer(folder, vocab):
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    with pytest.raises(ValueError, match=r"above every id of the tokenizer; it is 96, and 'a' has"):
        models.load(folder)


def test_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[models\]"'):
        models.load(LLAMA)


def test_float64_needs_x64(folder):
    with jax.enable_x64(False), pytest.raises(ValueError, match="only if `jax_enable_x64` is set"):
        models.load(folder, dtype="float64")
