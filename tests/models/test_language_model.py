"""Checkpoints that hold more than a language model: the language model is read and saved alone."""

import json
import warnings

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dpo_eqx import models

from .golden import shaken
from .make_families import read_golden, write_checkpoint

GOLDEN = read_golden()
VISION = {
    "vision_tower.embeddings.weight": np.ones((3, 2), np.float32),
    "multi_modal_projector.norm.weight": np.ones(2, np.float32),
}
# A head that predicts a second token.
HEADS = {"mtp.fc.weight": np.ones((2, 2), np.float32)}
# The prefixes of the language model and of its unembedding, and of the other parts.
FORMS = {
    "older": ("language_model.model.", "language_model.lm_head.", ""),
    "newer": ("model.language_model.", "lm_head.", "model."),
    "base": ("language_model.", "lm_head.", ""),
}


def outer_folder(inner, outer, form, folder, **keys):
    """A checkpoint like `inner` with vision weights beside it."""
    folder.mkdir()
    model, head, others = FORMS[form]
    config = json.loads((inner / "config.json").read_text())
    tied = config["tie_word_embeddings"]
    config = {"model_type": outer, "text_config": config, "vision_config": {"hidden_size": 4}}
    config |= {"tie_word_embeddings": tied, "image_token_index": 7} | keys
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    tensors = {}
    for name, tensor in load_file(inner / "model.safetensors").items():
        is_head = name.startswith("lm_head.")
        prefix, short = (head, name[8:]) if is_head else (model, name.removeprefix("model."))
        tensors[prefix + short] = tensor
    tensors |= {others + name: tensor for name, tensor in VISION.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "outer"), [("gemma3", "gemma3"), ("ministral3", "mistral3")])
def test_the_language_model_is_read_and_saved_alone(name, outer, form, tmp_path):
    inner = write_checkpoint(GOLDEN[name], tmp_path / "inner")
    folder = outer_folder(inner, outer, form, tmp_path / "outer")
    want = models.load(inner)
    with pytest.warns(UserWarning, match="a language model and 2 tensors .* Only"):
        policy = models.load(folder)
    leaves = map(jax.tree.leaves, (policy, want))
    assert all(map(np.array_equal, *leaves))
    assert policy.config == want.config
    with pytest.warns(
        UserWarning, match=f"language model of a '{outer}' checkpoint. It is saved a"
    ):
        models.save(policy, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == GOLDEN[name]["config"]["model_type"]
    assert config["architectures"][0].endswith("ForCausalLM")
    assert "text_config" not in config
    assert not (tmp_path / "saved" / "processor_config.json").exists()
    assert (tmp_path / "saved" / "tokenizer_config.json").exists()
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    before = load_file(inner / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(np.array_equal(saved[key], before[key]) for key in saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.save(models.load(tmp_path / "saved"), tmp_path / "again")


def test_what_the_outer_configuration_decides(tmp_path):
    inner = write_checkpoint(GOLDEN["gemma3"], tmp_path / "inner")
    folder = outer_folder(inner, "gemma3", "older", tmp_path / "outer")
    values = json.loads((folder / "config.json").read_text())
    assert models.read_config(values).tied
    assert not models.read_config({**values, "tie_word_embeddings": False}).tied
    del values["tie_word_embeddings"]
    values["text_config"]["tie_word_embeddings"] = False
    assert models.read_config(values).tied
    with pytest.raises(ValueError, match="`quantization_config`: quantised checkpoints"):
        models.read_config({**values, "quantization_config": {"bits": 4}})
    with pytest.raises(ValueError, match=r"`text_config` must hold the keys .* 'gemma3'; got None"):
        models.read_config({"model_type": "gemma3"})


def test_unknown_parts_are_extra(tmp_path):
    inner = write_checkpoint(GOLDEN["gemma3"], tmp_path / "inner")
    folder = outer_folder(inner, "gemma3", "older", tmp_path / "outer")
    tensors = load_file(folder / "model.safetensors")
    tensors["audio_tower.weight"] = np.ones(2, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.warns(UserWarning, match="2 tensors of other parts"),
        pytest.raises(ValueError, match=r"extra: audio_tower\.weight"),
    ):
        models.load(folder)


def test_qwen_with_images_and_with_a_head_for_a_second_token(tmp_path):
    inner = write_checkpoint(GOLDEN["qwen3-5-delta"], tmp_path / "inner")
    want = models.load(inner)
    tensors = load_file(inner / "model.safetensors")
    save_file(tensors | HEADS, inner / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"has 1 tensors of heads .* such as mtp\.fc\.weight"):
        assert eqx.tree_equal(models.load(inner), want)
    save_file(tensors, inner / "model.safetensors", metadata={"format": "pt"})
    folder = outer_folder(inner, "qwen3_5", "newer", tmp_path / "outer")
    values = json.loads((folder / "config.json").read_text())
    del values["tie_word_embeddings"]
    assert not models.read_config(values).tied
    outer = load_file(folder / "model.safetensors")
    others = {"model.visual.pos_embed.weight": np.ones((2, 2), np.float32)}
    language = {name: tensor for name, tensor in outer.items() if "vision" not in name}
    language = {name: tensor for name, tensor in language.items() if "projector" not in name}
    save_file(language | others | HEADS, folder / "model.safetensors", metadata={"format": "pt"})
    with (
        pytest.warns(UserWarning, match="a language model and 1 tensors of other parts"),
        pytest.warns(UserWarning, match="has 1 tensors of heads"),
    ):
        policy = models.load(folder)
    assert policy.config == want.config
    assert all(map(np.array_equal, jax.tree.leaves(policy), jax.tree.leaves(want)))
    with pytest.warns(UserWarning, match="of a 'qwen3_5' checkpoint"):
        models.save(policy, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == ["Qwen3_5ForCausalLM"]
    assert saved["model_type"] == "qwen3_5_text"


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory):
    """The language model of a checkpoint with images, and its adapters."""
    folder = tmp_path_factory.mktemp("vision")
    inner = write_checkpoint(GOLDEN["gemma3"], folder / "inner")
    with pytest.warns(UserWarning, match="2 tensors of other parts"):
        base = models.load(outer_folder(inner, "gemma3", "newer", folder / "outer"))
    target = r"attention\.(query|value)"
    return base, shaken(models.add_lora(base, rank=2, target=target, key=jax.random.key(0)))


def test_adapters_have_the_names_of_the_whole_checkpoint(with_adapters, tmp_path):
    base, policy = with_adapters
    models.save_lora(policy, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    front = "base_model.model.model.language_model.layers."
    assert len(names) == 12
    assert all(name.startswith(front) for name in names)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    # No name may be the end of a name in the vision tower.
    assert all(name.startswith("model.language_model.layers.") for name in targets)
    assert eqx.tree_equal(models.load_lora(base, tmp_path), policy)


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_the_whole_checkpoint_are_read(with_adapters, form, tmp_path):
    base, policy = with_adapters
    models.save_lora(policy, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    front, prefix = "base_model.model.", FORMS[form][0]
    renamed = {k.replace("model.language_model.", prefix): x for k, x in tensors.items()}
    vision = f"{front}vision_tower.layers.0.self_attn.q_proj.lora_A.weight"
    renamed |= {vision: np.ones((2, 3), np.float32)}
    save_file(renamed, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["target_modules"] = r".*language_model.*\.(q_proj|v_proj)|.*vision_tower.*\.q_proj"
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="1 tensors of other parts"):
        assert eqx.tree_equal(models.load_lora(base, tmp_path), policy)
