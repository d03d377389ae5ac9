"""All families with many of their options against `transformers`: logits and round trips."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dpo_eqx as dpx
from dpo_eqx import models, sharding
from dpo_eqx.models._checkpoint.config_json import write_config
from dpo_eqx.models._checkpoint.families import FAMILIES

from ..policies import Plain, assert_close
from ..test_packed import PACKED, PADDED, ROWS, in_order, value_and_gradient
from .family_cases import CASES, DENSE, IDS, OLDER, POSITIONS, TOKENS
from .golden import ragged_batch, shaken
from .make_families import read_defaults, read_golden, save, write_checkpoint
from .test_generate import Uncached

GOLDEN = read_golden()
# Each case compiles for a second or more: by default those with the most pieces of their own.
DEFAULT = ("apertus", "cohere", "gemma3", "gpt-neox", "gpt-oss", "lfm2", "mixtral", "phi3-long")
DEFAULT += ("qwen3-5-rest", "qwen3-moe-mixed")


def cases(default=DEFAULT, of=CASES):
    return [pytest.param(n, marks=() if n in default else pytest.mark.slow) for n in of]


@pytest.fixture
def checkpoint(tmp_path):
    """A function that writes the checkpoint of a case."""
    return lambda name: write_checkpoint(GOLDEN[name], tmp_path / name)


@eqx.filter_jit
def logits_of(policy, ids):
    return jax.vmap(policy)(ids)


def apart(name, logits):
    """The largest deviation from `transformers`, relative to its largest logit."""
    want = np.asarray(GOLDEN[name]["logits"])
    return np.abs(np.asarray(logits)[:, POSITIONS, TOKENS] - want).max() / GOLDEN[name]["scale"]


def test_every_family_has_a_case():
    assert FAMILIES.keys() == {*OLDER, *(family for family, _ in CASES.values())}
    assert GOLDEN.keys() == CASES.keys()


def test_missing_keys_have_the_defaults_of_transformers():
    defaults = read_defaults()
    assert defaults.keys() == FAMILIES.keys()
    for family, values in defaults.items():
        config = models.read_config(values["config"])
        assert models.read_config({"model_type": family}) == config, family


def test_classes_are_those_of_transformers():
    for name, values in read_defaults().items():
        assert FAMILIES[name].architecture == values["architecture"]
        assert FAMILIES[name].classifier == values["classifier"]


@pytest.mark.parametrize("name", cases())
def test_logits(name, checkpoint):
    """In float64 rounding is all that differs: a term that is left out or misplaced shows."""
    policy = models.load(checkpoint(name), dtype=jnp.float64)
    assert apart(name, logits_of(policy, IDS)) < 1e-9


@pytest.mark.parametrize("name", cases(default=()))
def test_logits_in_float32(name, checkpoint):
    # Rounding grows in a delta rule: `transformers` in float32 is off by 1.1e-5 and 2.6e-5.
    limit = {"qwen3-5": 3e-5, "qwen3-5-delta": 3e-5}.get(name, 5e-6)
    assert apart(name, logits_of(models.load(checkpoint(name)), IDS)) < limit


@pytest.mark.parametrize("name", CASES)
def test_configurations_are_written_as_they_were_read(name):
    config = models.read_config(GOLDEN[name]["config"])
    assert models.read_config(write_config(config)) == config


def test_families_that_need_a_window_are_written_with_one():
    for family in ("ministral", "gemma2", "gemma3_text", "olmo3", "cohere2", "gpt_oss"):
        keys = {"model_type": family, "num_hidden_layers": 2, "max_position_embeddings": 99}
        config = models.read_config({**keys, "layer_types": ["full_attention"] * 2})
        assert config.windows == (None, None)
        assert write_config(config)["sliding_window"] == 99


@pytest.mark.parametrize("name", cases(default=("apertus", "codegen", "qwen3-5-rest")))
def test_round_trip_is_bit_identical(name, checkpoint, tmp_path):
    folder = checkpoint(name)
    policy = models.load(folder)
    models.save(policy, tmp_path / "saved")
    assert eqx.tree_equal(models.load(tmp_path / "saved"), policy)
    before, after = (path / "model.safetensors" for path in (folder, tmp_path / "saved"))
    assert before.stat().st_size == after.stat().st_size


@pytest.mark.parametrize("name", cases(default=()))
def test_shared_prompts_and_packed_rows(name, checkpoint):
    """In value and gradient as each sequence alone."""
    policy = models.load(checkpoint(name), dtype=jnp.float64)
    slopes = np.random.default_rng(1).normal(size=(2, len(ROWS)))
    spread = np.where(PACKED.index >= 0, slopes[:, PACKED.index], 0)
    want, want_slopes = value_and_gradient(Plain(policy), PADDED, dpx.score_pairs, slopes)
    for batch, score, own in (
        (PADDED, dpx.score_pairs, slopes),
        (PACKED, dpx.score_packed, spread),
    ):
        got, got_slopes = value_and_gradient(policy, batch, score, own)
        got = got if batch is PADDED else jax.tree.map(in_order, got)
        assert_close(got, jax.tree.map(np.asarray, want), 1e-10)
        assert_close(got_slopes, want_slopes.policy, 1e-10)


def shortened(policy, limit):
    """The same parameters; sequences of more than `limit` tokens have another rotation."""
    rotary = dataclasses.replace(policy.config.rotary, original_length=limit)
    rotaries = (rotary,) * policy.config.layers
    config = dataclasses.replace(policy.config, rotary=rotary, rotaries=rotaries)
    make = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(make), jax.tree.leaves(policy))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(default=("phi3-long",), of=("phi3-long", "llama-dynamic")))
def test_the_real_length_of_a_sequence_decides(name, checkpoint):
    """Not padding, nor the other completion of the pair: here one is short, the other long."""
    policy = shortened(models.load(checkpoint(name), dtype=jnp.float64), 8)
    assert not policy.shares_prompts(9)
    assert policy.shares_prompts(8)
    batch = ragged_batch(0, vocab=80)
    got = eqx.filter_jit(dpx.score_pairs)(policy, batch)
    pair, lengths = 1, {}
    for side in ("chosen", "rejected"):
        prompt, completion = batch.prompt, getattr(batch, side)
        start = prompt.ids[pair][prompt.mask[pair]]
        end = np.flatnonzero(completion.mask[pair]).max() + 1
        ids = np.concatenate([start, completion.ids[pair, :end]])
        lengths[side] = len(ids)
        log_probs = dpx.token_log_probs(policy(ids)[:-1], ids[1:])[len(start) - 1 :]
        want = np.where(completion.mask[pair, :end], log_probs, 0).sum()
        assert np.abs(getattr(got, side)[pair] - want) < 1e-10
    assert lengths == {"chosen": 3, "rejected": 9}


def test_rows_in_which_lengths_differ_are_refused(checkpoint):
    policy = shortened(models.load(checkpoint("phi3-long")), 8)
    with pytest.raises(ValueError, match=r"more than 8; got a row of up to 11.*its own prompt"):
        dpx.score_packed(policy, PACKED)


@pytest.mark.parametrize("name", cases(default=()))
def test_a_cache_equals_whole_rows(name, checkpoint):
    policy = models.load(checkpoint(name))
    prompt = dpx.Tokens(IDS[:, :9], np.arange(9) < np.array([[9], [4]]))
    got, want = (
        models.generate(policy, prompt, max_new_tokens=8, temperature=0)
        for policy in (policy, Uncached(policy))
    )
    assert np.array_equal(got.ids, want.ids)


@pytest.mark.slow
def test_generation_past_the_limit(checkpoint):
    """Each token is what the whole row so far predicts, with the rotation of its length."""
    policy = shortened(models.load(checkpoint("phi3-long"), dtype=jnp.float64), 6)
    prompt = dpx.Tokens(IDS[:1, :6], np.arange(6)[None] < 5)
    got = models.generate(policy, prompt, max_new_tokens=3, temperature=0)
    ids = IDS[0, :5]
    for token in got.ids[0].tolist():
        assert token == int(np.argmax(policy(ids)[-1]))
        ids = np.append(ids, token)


FUSED = ("gpt-neox", "phi3")


@pytest.mark.parametrize("name", cases(default=FUSED))
def test_adapters_come_back_from_the_format_of_peft(name, checkpoint, tmp_path):
    base = models.load(checkpoint(name))
    policy = shaken(models.add_lora(base, rank=3, alpha=5, target="", key=jax.random.key(0)))
    models.save_lora(policy, tmp_path / "adapter")
    assert eqx.tree_equal(models.load_lora(base, tmp_path / "adapter"), policy)


@pytest.mark.parametrize("name", cases(default=FUSED, of=DENSE))
def test_adapters_of_fused_modules_with_one_down(name, checkpoint, tmp_path):
    base = models.load(checkpoint(name))
    policy = shaken(models.add_lora(base, rank=3, alpha=5, target="", key=jax.random.key(0)))
    attention = policy.layers.attention
    alike = eqx.tree_at(
        lambda policy: [getattr(policy.layers.attention, part).down for part in ("key", "value")],
        policy,
        [attention.query.down] * 2,
    )
    models.save_lora(alike, tmp_path / "alike")
    assert eqx.tree_equal(models.load_lora(base, tmp_path / "alike"), alike)
    # If the parts of a fused module share $A$, so does the file: the rank stays.
    ranks = {
        tensor.shape[0]
        for key, tensor in load_file(tmp_path / "alike" / "adapter_model.safetensors").items()
        if re.search(r"(qkv_proj|query_key_value|[qkv]_proj)\.lora_A", key)
    }
    assert ranks == {3}


@pytest.mark.parametrize("name", cases(default=()))
def test_quantised_as_it_is_read(name, checkpoint):
    folder = checkpoint(name)
    want = models.quantize(models.load(folder), "int8")
    assert eqx.tree_equal(models.load(folder, quantize="int8"), want)


@pytest.mark.parametrize("name", cases(default=("gpt-neox",)))
def test_each_device_reads_its_own_part(name, checkpoint):
    folder = checkpoint(name)
    mesh = sharding.make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4])
    got = sharding.gather(models.load(folder, sharding=sharding.placement(mesh)))
    for part, whole in zip(jax.tree.leaves(got), jax.tree.leaves(models.load(folder)), strict=True):
        assert np.array_equal(part, whole)


@pytest.mark.parametrize("name", cases(default=()))
def test_devices_and_recomputation_change_nothing(name, checkpoint):
    folder = checkpoint(name)
    policy = models.load(folder, dtype=jnp.float64)
    slopes = np.ones((2, 4))
    batch = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), ragged_batch(0, vocab=80))
    want = value_and_gradient(policy, batch, dpx.score_pairs, slopes)
    mesh = sharding.make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4])
    placed = sharding.shard_policy(models.load(folder, dtype=jnp.float64, remat=True), mesh)
    got = value_and_gradient(placed, sharding.shard_batch(batch, mesh), dpx.score_pairs, slopes)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(np.asarray(one), np.asarray(other), 1e-10)


PUBLISHED = [
    ("gptj", {"rotary": True, "scale_attn_weights": True}),
    ("starcoder2", {"norm_type": "layer_norm", "attention_softmax_in_fp32": True}),
    ("cohere2", {"position_embedding_type": "rope_gptj", "use_parallel_block": True}),
    ("phi3", {"auto_map": {"AutoModelForCausalLM": "modeling.X"}, "full_attn_mod": 1}),
    ("hunyuan_v1_dense", {"use_qk_norm": True, "norm_type": "rms"}),
    ("apertus", {"qk_norm": True}),
]


@pytest.mark.parametrize(("family", "keys"), PUBLISHED)
def test_keys_of_published_files_that_say_what_the_family_is(family, keys):
    plain = {"model_type": family}
    assert models.read_config({**plain, **keys}) == models.read_config(plain)
    for key in keys.keys() - {"auto_map"}:
        with pytest.raises(ValueError, match=f"`{key}`"):
            models.read_config({**plain, key: "else"})


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        ("gpt-neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("codegen", "transformer.h.1.attn.causal_mask"),
    ],
)
def test_buffers_of_older_checkpoints_are_no_parameters(name, constant, checkpoint):
    folder = checkpoint(name)
    want = models.load(folder)
    tensors = load_file(folder / "model.safetensors")
    save({**tensors, constant: np.ones((), np.float32)}, folder)
    assert eqx.tree_equal(models.load(folder), want)


def test_constants_of_an_activation_must_be_its_own(checkpoint):
    folder = checkpoint("apertus")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.act_fn.beta"
    save({**tensors, name: np.asarray(0.4, np.float32)}, folder)
    with pytest.raises(ValueError, match=r"act_fn\.beta is 0\.4.*, and only 0\.5 is supported"):
        models.load(folder)
