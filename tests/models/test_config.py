"""`config.json` in all of its ways of writing, and back."""

import dataclasses
import json

import pytest

from dpo_eqx import models
from dpo_eqx.models.families import FAMILIES
from dpo_eqx.models.hf import write_config

from .golden import CHECKPOINTS, FAMILIES as FOLDERS

QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 8}


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=FOLDERS)
def test_written_as_it_was_read(folder):
    values = json.loads((folder / "config.json").read_text())
    config = models.read_config(values)
    written = write_config(config)
    assert models.read_config(written) == config
    # The two that `transformers` leaves to other keys where they do not matter.
    other = {"max_window_layers", "n_inner"}
    assert {key: written[key] for key in written.keys() & values.keys() - other} == {
        key: values[key] for key in written.keys() & values.keys() - other
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_defaults_and_older_keys(family):
    """Both ways of writing the rotary embedding stand for one configuration."""
    config = models.read_config({"model_type": family})
    written = write_config(config)
    assert models.read_config(written) == config
    if config.rotary is None:
        return
    newer = {key: value for key, value in written.items() if key not in ("rope_theta",)}
    del newer["rope_scaling"]
    older = {key: value for key, value in written.items() if key != "rope_parameters"}
    assert models.read_config(newer) == models.read_config(older) == config


def test_defaults_of_transformers():
    assert models.read_config({"model_type": "llama"}).key_heads == 32
    assert models.read_config({"model_type": "mistral"}).key_heads == 8
    assert models.read_config({"model_type": "mistral"}).windows == (4096,) * 32
    assert models.read_config({"model_type": "qwen3", "hidden_size": 64}).head_width == 128
    assert models.read_config({"model_type": "gemma2"}).windows[:3] == (4096, None, 4096)
    assert models.read_config({"model_type": "gpt2"}).residual_dropout == 0.1
    assert models.read_config({"model_type": "phi"}).rotary.fraction == 0.5
    llama = {"model_type": "llama", "num_attention_heads": 64, "head_dim": None}
    assert models.read_config(llama).head_width == 64
    gpt2 = models.read_config(
        {"model_type": "gpt2", "hidden_size": 96, "scale_attn_weights": False}
    )
    assert (gpt2.width, gpt2.feed_forward, gpt2.attention_scale) == (96, 384, 1.0)


def test_windows_of_qwen():
    assert models.read_config(QWEN2).windows == (None,) * 4
    used = {**QWEN2, "use_sliding_window": True}
    assert models.read_config(used).windows == (None,) * 4
    late = models.read_config({**used, "max_window_layers": 3})
    assert late.windows == (None, None, None, 8)
    types = ["sliding_attention", "full_attention"] * 2
    listed = models.read_config({**used, "layer_types": types})
    assert listed.windows == (8, None, 8, None)
    for config in (late, listed):
        assert models.read_config(write_config(config)) == config


def rotary(**scaling):
    values = {"model_type": "llama", "max_position_embeddings": 512, "rope_theta": 7.0}
    return models.read_config({**values, "rope_scaling": scaling}).rotary


def test_kinds_of_rotary_embeddings():
    assert rotary(type="linear", factor=2).kind == "linear"
    assert rotary(rope_type="linear", factor=2).factor == 2.0
    llama3 = rotary(rope_type="llama3", factor=8, low_freq_factor=1, high_freq_factor=4)
    assert (llama3.original_length, llama3.theta) == (512, 7.0)
    yarn = rotary(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    assert yarn.amplitude == pytest.approx(1.13863, abs=1e-5)
    assert rotary(rope_type="yarn", factor=4.0, attention_factor=1.5).amplitude == 1.5
    yarn = rotary(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5)
    assert yarn.amplitude == pytest.approx(1.13863 / 1.06931, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mamba"}, r"must be one of \['gemma2', 'gpt2', 'llama'.*got 'mamba'"),
        ({}, "got None"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope'.*not built"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'.*not built"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "one for all layers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be 1 in the family 'llama'"),
        ({"hidden_act": "xielu"}, "activation must be one of .*'silu'.*; got 'xielu'"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config`: .* not built"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"]}, "'linear_attention'.*not"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "is True; that is not"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "`add_cross_attention`"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
    ],
)
def test_what_is_not_built_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        models.read_config({"model_type": "llama", **values} if values else {})


def test_what_a_family_cannot_say_is_refused():
    config = models.Config(vocab=9, width=8, layers=2, heads=2)
    assert models.read_config(write_config(config)) == config
    odd = dataclasses.replace(config, parallel=True, windows=(4, 4))
    with pytest.raises(ValueError, match=r"'llama' cannot say `parallel` \(True\), `windows`"):
        write_config(odd)
