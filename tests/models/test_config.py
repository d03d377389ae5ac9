"""`config.json` in all of its ways of writing, and back."""

import dataclasses
import json
import re

import pytest

from dpo_eqx import models
from dpo_eqx.models._checkpoint.config_json import write_config
from dpo_eqx.models._checkpoint.families import FAMILIES

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
    newer = {
        key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")
    }
    assert models.read_config(newer) == config
    if "rope_scaling" in written:
        older = {key: value for key, value in written.items() if key != "rope_parameters"}
        assert models.read_config(older) == config


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


def test_windows_of_mistral():
    """One window for all layers; with `layer_types` as `transformers` reads them, as Ministral."""
    mistral = {"model_type": "mistral", "num_hidden_layers": 3, "sliding_window": 8}
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    mixed = models.read_config({**mistral, "layer_types": types})
    assert mixed.windows == (8, None, 8)
    written = write_config(mixed)
    assert (written["layer_types"], written["sliding_window"]) == (types, 8)
    assert models.read_config(written) == mixed
    for other in ({}, {"layer_types": None}, {"layer_types": ["sliding_attention"] * 3}):
        config = models.read_config({**mistral, **other})
        assert config.windows == (8, 8, 8)
        assert "layer_types" not in write_config(config)
    for other in (
        {"sliding_window": None},
        {"layer_types": ["full_attention", "attention", *types[1:2]]},
    ):
        assert models.read_config({**mistral, **other}).windows == (None,) * 3


def test_nulls_in_rotary_embeddings():
    """As `transformers` reads them: YaRN's factor is the ratio of lengths, a null is a default."""
    yarn = rotary(rope_type="yarn", factor=None, original_max_position_embeddings=128)
    assert (yarn.factor, yarn.original_length) == (4.0, 128)
    assert yarn.amplitude == pytest.approx(1.13863, abs=1e-5)
    assert yarn == rotary(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
    assert rotary(rope_type="yarn", factor=None).factor == 1.0
    nulls = {"attention_factor": None, "beta_fast": None, "beta_slow": None, "mscale": None}
    lengths = {"factor": None, "original_max_position_embeddings": 128}
    assert rotary(rope_type="yarn", **lengths, **nulls, rope_theta=None) == yarn
    assert not rotary(rope_type="yarn", **lengths, truncate=None).truncate
    outer = {"model_type": "llama", "max_position_embeddings": 512, "rope_theta": 7.0}
    outer["original_max_position_embeddings"] = 128
    scaling = {"rope_type": "yarn", "factor": None}
    assert models.read_config({**outer, "rope_scaling": scaling}).rotary == yarn
    assert (
        models.read_config({"model_type": "phi", "partial_rotary_factor": None}).rotary.fraction
        == 0.5
    )


WRONG = [
    ({"hidden_size": "64"}, "`hidden_size` in config.json must be a positive integer; got '64'"),
    ({"hidden_size": True}, "`hidden_size` .* positive integer; got True"),
    ({"num_hidden_layers": 2.0}, "`num_hidden_layers` .* positive integer; got 2.0"),
    ({"vocab_size": None}, "`vocab_size` .* positive integer; got None"),
    ({"intermediate_size": -4}, "`intermediate_size` .* positive integer; got -4"),
    ({"head_dim": -8}, "`head_dim` .* positive integer, or null; got -8"),
    ({"rope_theta": "10000"}, "`rope_theta` .* positive number, or null; got '10000'"),
    ({"rope_theta": float("nan")}, "`rope_theta` .* positive number, or null; got nan"),
    ({"rms_norm_eps": True}, "`rms_norm_eps` .* number of at least 0; got True"),
    ({"tie_word_embeddings": "false"}, "`tie_word_embeddings` .* true or false; got 'false'"),
    ({"attention_bias": 1}, "`attention_bias` .* true or false; got 1"),
    ({"attention_dropout": 1}, "`attention_dropout` .* 0 to below 1, or null; got 1"),
    ({"hidden_act": None}, "`hidden_act` .* a text; got None"),
    ({"rope_scaling": "yarn"}, "`rope_scaling` .* object of keys and values, or null; got 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "`factor` in `rope_scaling` of config"),
    ({"rope_parameters": {"rope_theta": -1}}, "`rope_theta` in `rope_parameters` of .*; got -1"),
    ({"model_type": "gpt2", "hidden_size": "96"}, "`hidden_size` .* integer; got '96'"),
    ({"model_type": "mistral", "sliding_window": 0}, "`sliding_window` .* or null; got 0"),
    ({"model_type": "qwen2", "layer_types": "full"}, "`layer_types` .* list of texts, or null"),
    ({"model_type": "gemma2", "attn_logit_softcapping": 0}, "`attn_logit_softcapping` .*; got 0"),
    (
        {"hidden_size": 0, "vocab_size": "9" * 99},
        r"`hidden_size` .* got 0; `vocab_size` .* got '9{59}\.\.\.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_values_of_another_kind_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        models.read_config({"model_type": "llama", **values})


# Real files hold these; none changes what the model computes.
HARMLESS = {
    "_name_or_path": "somewhere",
    "_attn_implementation_autoset": True,
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token": "<pad>",
    "initializer_range": 0.02,
    "pretraining_tp": 2,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "unsloth_version": "2024.9",
    "use_cache": True,
    "hidden_dropout": 0.1,
    "task_specific_params": {"text-generation": {"do_sample": True}},
    "temperature": 0.7,
    "is_llama_config": True,
    "rope_interleaved": False,
    "is_causal": True,
    "logit_scale": 1.0,
    "num_experts": 0,
    "add_cross_attention": False,
    "auto_map": {"AutoTokenizer": ["tokenization.X", None]},
}
# What each would change in `transformers`, or in the model that the file was written for.
CHANGING = {
    "is_causal": False,
    "logit_scale": 0.5,
    "residual_multiplier": 0.2,
    "embedding_multiplier": 12,
    "num_experts": 8,
    "num_local_experts": 2,
    "use_qk_norm": True,
    "clip_qkv": 8.0,
    "alibi": True,
    "attention_chunk_size": 64,
    "no_rope_layers": [1, 0],
    "per_layer_config": {"1": {"intermediate_size": 20}},
    "something": "else",
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_keys_that_are_not_read(family):
    """Passed over if they cannot change the logits; otherwise an error that names them all."""
    config = models.read_config({"model_type": family})
    known = FAMILIES[family].reads() | FAMILIES[family].neutral.keys()
    changing = {key: CHANGING[key] for key in CHANGING.keys() - known}
    assert len(changing) > len(CHANGING) - 4
    harmless = {key: HARMLESS[key] for key in HARMLESS.keys() - FAMILIES[family].reads()}
    assert models.read_config({"model_type": family, **harmless}) == config
    with pytest.raises(ValueError, match=f"The family '{family}' does not read") as error:
        models.read_config({"model_type": family, **harmless, **changing})
    named = re.findall(r"`(\w+)` \(", str(error.value))
    assert named == sorted(changing)
    for key, value in changing.items():
        with pytest.raises(ValueError, match=f"`{key}`"):
            models.read_config({"model_type": family, key: value})
    with pytest.raises(ValueError, match="`is_causal`"):
        models.read_config({"model_type": family, "is_causal": None})


def test_keys_of_other_families():
    """They are passed over if they say what the configuration is anyway."""

    def read(family, **values):
        return models.read_config({"model_type": family, **values})

    gemma2 = read("gemma2")
    assert (
        read("gemma2", hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")
        == gemma2
    )
    assert read("qwen2", attention_bias=True) == read("qwen2")
    assert read("gpt2", head_dim=64, n_ctx=1024, num_key_value_heads=12) == read("gpt2")
    full = {"layer_types": ["full_attention"] * 32}
    unused = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
    assert read("llama", **full, **unused) == read("llama")
    for family, values in [
        ("gemma2", {"hidden_act": "relu"}),
        ("mistral", {"attention_bias": True}),
        ("gpt2", {"head_dim": 32}),
        ("llama", {"sliding_window": 4096}),
        ("llama", {"layer_types": ["sliding_attention"] * 32}),
        ("llama", {"use_sliding_window": True, "max_window_layers": 8}),
        ("llama", {"qk_layernorm": True}),
        ("llama", {"attn_logit_softcapping": 50.0}),
        ("phi", {"mlp_bias": 1}),
    ]:
        with pytest.raises(ValueError, match="`" + "`.*`".join(sorted(values))):
            read(family, **values)
    assert read("gpt2", hidden_size=96, n_embd=96).width == 96


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mamba"}, r"must be one of \['apertus', .*'gpt2'.*'llama'.*got 'mamba'"),
        ({}, "got None"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' needs 'long_factor', 'short_factor'"),
        (
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [2.0]}},
            "`long_factor` must have one number for each frequency, 64; got 1 and 1",
        ),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic' needs 'factor'"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "'su'.*not supported"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear"}}, "'longrope'; got 'linear'"),
        ({"model_type": "gptj", "rotary_dim": 300}, "at most the width of a head, 256; got 300"),
        ({"model_type": "gptj", "rotary_dim": 3}, "`rotary_dim` .* must be even"),
        (
            {"model_type": "codegen", "n_embd": 54, "n_head": 1, "rotary_dim": 4},
            "`n_embd` .* multiple of 4 in the family 'codegen'; got 54",
        ),
        (
            {"model_type": "stablelm", "hidden_size": 48, "num_attention_heads": 4},
            "an even part of each head .*'stablelm'; got 0.25 of 12",
        ),
        (
            {"model_type": "gpt_neox", "hidden_size": 48, "num_attention_heads": 4}
            | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "must be even for the rotary embedding of type 'yarn'",
        ),
        (
            {"model_type": "olmo3", "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "`type` 'yarn', which `transformers` ignores in the family 'olmo3'",
        ),
        (
            {"model_type": "exaone4", "sliding_window_pattern": "LLLG"},
            "`sliding_window_pattern` .* positive integer .* no `layer_types`; got 'LLLG'",
        ),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e6}},
            "`rope_parameters` .* keys 'full_attention' and 'sliding_attention'",
        ),
        (
            {"model_type": "ministral3", "rope_scaling": {"type": "yarn", "factor": 4}},
            "`llama_4_scaling_beta` in `rope_scaling` of config.json must be a number of at least",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "one entry per layer, 36; got 2"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "one for all layers"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "needs 'high_freq_factor', 'low_freq_factor'",
        ),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` must be 1 in the family 'llama'"),
        ({"hidden_act": "xielu"}, "activation must be one of .*'silu'.*; got 'xielu'"),
        ({"quantization_config": {"bits": 4}}, "`quantization_config`: .* not supported"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"]}, "'linear_attention'.*not"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "True; that is not supp"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "`add_cross_attention`"),
        ({"auto_map": {"AutoModel": "modeling.X"}}, "`auto_map` .* own for AutoModel .* never run"),
        (
            {"num_key_value_heads": 5},
            "`num_attention_heads` .* multiple of `num_key_value_heads`; ",
        ),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "says 32; got 1"),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32},
            "`layer_types` has layers of 'sliding_attention'.*or `use_sliding_window` is false",
        ),
        ({"rope_scaling": {"factor": 2.0}}, r"'default' has no 'factor' \(2.0\), which `rope_scal"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "needs 'factor' in `rope_parameters`"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "needs 'factor' in `rope_scaling`"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "mscale": 1}},
            "'linear' has no 'mscale'",
        ),
    ],
)
def test_what_is_not_built_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        models.read_config({"model_type": "llama", **values} if values else {})


@pytest.mark.parametrize("name", ["heads", "key_heads", "head_width", "feed_forward", "max_length"])
def test_negative_sizes(name):
    sizes = {"vocab": 9, "width": 8, "layers": 2, "heads": 2, name: -2}
    with pytest.raises(ValueError, match=f"`{name}` must be positive.*got -2"):
        models.Config(**sizes)


def test_what_a_family_cannot_say_is_refused():
    config = models.Config(vocab=9, width=8, layers=2, heads=2)
    assert models.read_config(write_config(config)) == config
    odd = dataclasses.replace(config, parallel=True, windows=(4, 4))
    with pytest.raises(ValueError, match=r"'llama' cannot store `parallel` \(True\), `windows`"):
        write_config(odd)
