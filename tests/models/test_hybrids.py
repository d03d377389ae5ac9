"""Stacks of layers of two kinds: their runs, prompts with forks, packed rows, caches, training."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx.models._decoder.blocks import layers_at, runs_of

from ..policies import VOCAB, Plain, as_users_compile, assert_close, random_batch
from ..test_packed import PACKED, PADDED, ROWS, in_order, value_and_gradient
from .golden import Uncached

SIZES = {"vocab": VOCAB, "width": 8, "heads": 2, "feed_forward": 8}
CONVOLUTION = models.Recurrence(kind="convolution", kernel=3, bias=True)
DELTA = models.Recurrence(
    kind="delta", kernel=3, key_heads=1, value_heads=2, key_width=3, value_width=4
)
CONFIGS = {
    # A block of two layers twice, and a rest.
    "convolution": models.Config(
        **SIZES, layers=5, recurrence=CONVOLUTION, recurrent=(True, False, True, False, True)
    ),
    "delta": models.Config(
        **SIZES, layers=2, recurrence=DELTA, recurrent=(True, False), attention_gate=True
    ),
}


def decoder(config, factor=3):
    """A policy in float64, with weights so large that who sees whom matters."""
    policy = models.Transformer(config, key=jax.random.key(1))
    arrays, static = eqx.partition(policy, eqx.is_array)
    return eqx.combine(jax.tree.map(lambda x: factor * x.astype(np.float64), arrays), static)


POLICIES = {name: decoder(config) for name, config in CONFIGS.items()}
BOTH = pytest.mark.parametrize("name", CONFIGS)
# Compiling takes so long that each of two long tests runs one kind by default.
FIRST, SECOND = (
    pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=() if name == quick else pytest.mark.slow) for name in CONFIGS],
    )
    for quick in CONFIGS
)


@pytest.mark.parametrize(
    ("types", "blocks"),
    [
        ("aaaa", [("a", 4)]),
        ("rrra" * 6, [("rrra", 6)]),
        ("rrra" * 2 + "rr", [("rrra", 2), ("r", 2)]),
        ("ra" * 3 + "r", [("ra", 3), ("r", 1)]),
        # LFM2-1.2B.
        ("rra" * 3 + "ra" * 3 + "r", [("rra", 3), ("ra", 3), ("r", 1)]),
        ("rararaarar", [("ra", 3), ("ar", 2)]),
        ("raar", [("r", 1), ("a", 2), ("r", 1)]),
    ],
)
def test_layers_are_split_into_few_blocks(types, blocks):
    runs = runs_of([(kind,) for kind in types])
    assert "".join("".join(kind for (kind,) in run.block) * run.repeats for run in runs) == types
    starts = np.cumsum([0, *(len(run.block) * run.repeats for run in runs)])
    assert [run.start for run in runs] == starts[:-1].tolist()
    # Other blocks of the same size are as good.
    assert sum(len(run.block) for run in runs) == sum(len(block) for block, _ in blocks)
    assert len(runs) == len(blocks)


def test_each_part_is_stacked_over_its_own_layers():
    policy = POLICIES["convolution"]
    layers, config = policy.layers, policy.config
    assert layers.attention.query.weight.shape == (2, 8, 8)
    assert layers.recurrence.filter.weight.shape == (3, 8, 1, 3)
    assert layers.attention_norm.weight.shape == (5, 8)
    assert layers_at("layers.attention.query.weight", config) == (1, 3)
    assert layers_at("layers.recurrence.filter.weight", config) == (0, 2, 4)
    assert layers_at("layers.attention_norm.weight", config) == (0, 1, 2, 3, 4)


def test_program_does_not_grow_with_depth():
    def equations(repeats):
        recurrent = (True, True, True, False) * repeats
        config = models.Config(
            **SIZES, layers=len(recurrent), recurrence=DELTA, recurrent=recurrent
        )
        policy = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
        ids = jnp.arange(20)
        return str(eqx.filter_make_jaxpr(lambda p, ids: p(ids))(policy, ids)[0]).count(" = ")

    assert equations(2) == equations(16)


@FIRST
def test_prompts_with_forks_and_packed_rows(name):
    """In value and gradient as each sequence alone."""
    policy = POLICIES[name]
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


@SECOND
def test_a_cache_equals_whole_rows(name):
    rng = np.random.default_rng(0)
    prompt = dpx.Tokens(rng.integers(0, VOCAB, (3, 6)), np.arange(6) < np.array([[6], [1], [3]]))
    arguments = {"samples": 2, "max_new_tokens": 6, "key": jax.random.key(0)}
    got, want = (
        models.sample(policy, prompt, **arguments)
        for policy in (POLICIES[name], Uncached(POLICIES[name]))
    )
    assert np.array_equal(got.tokens.ids, want.tokens.ids)
    assert_close(got.log_probs, want.log_probs, 1e-12)


@pytest.mark.slow
@BOTH
def test_training_step(name):
    """The first loss is log 2; recomputation and microbatches leave the gradient as it is."""
    batch = random_batch(seed=3)
    grad = eqx.filter_jit(dpx.make_grad(losses.dpo))
    policy = POLICIES[name]
    want, metrics = grad(policy, batch, dpx.snapshot(policy))
    assert abs(metrics["loss"] - np.log(2)) < 1e-12
    got, _ = eqx.filter_jit(dpx.make_grad(losses.dpo, microbatches=4))(
        policy, batch, dpx.snapshot(policy)
    )
    # Rounding of 3e-12 was seen in the delta rule, whose large weights here amplify it.
    assert_close(got, want, 1e-10)
    config = dataclasses.replace(policy.config, remat=True)
    skeleton = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
    again = jax.tree.unflatten(jax.tree.structure(skeleton), jax.tree.leaves(policy))
    got, _ = grad(again, batch, dpx.snapshot(again))
    assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-5)])
@BOTH
def test_first_loss_is_log_2_in_every_dtype(name, dtype, limit):
    policy = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, POLICIES[name])
    batch = jax.tree.map(
        lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, random_batch(seed=3)
    )
    grad = dpx.make_grad(losses.dpo, compute_dtype=dtype)
    _, metrics = as_users_compile(grad, policy, batch, dpx.snapshot(policy))
    assert abs(metrics["loss"] - np.log(2)) < limit


@pytest.mark.slow
def test_wide_layers_of_one_block_round_alike_in_bf16():
    """With small sizes XLA happens to fuse the policy and the reference in the same way."""
    delta = models.Recurrence(
        kind="delta", kernel=4, key_heads=4, value_heads=4, key_width=64, value_width=64
    )
    config = models.Config(
        vocab=VOCAB,
        width=256,
        heads=4,
        feed_forward=512,
        layers=6,
        recurrence=delta,
        recurrent=(True, True, False) * 2,
        attention_gate=True,
    )
    policy = models.Transformer(config, key=jax.random.key(0))
    policy = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_array(x) else x, policy)
    batch = random_batch(pairs=2, prompt=256, completion=128, weight=None)
    _, metrics = as_users_compile(dpx.make_grad(losses.dpo), policy, batch, policy)
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0


@pytest.mark.slow
@BOTH
def test_eight_devices_equal_one(name):
    batch = random_batch(seed=3)
    policy = POLICIES[name]
    want = eqx.filter_jit(dpx.make_grad(losses.dpo))(policy, batch, policy)
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    placed = sharding.shard_policy(policy, mesh)
    grad = eqx.filter_jit(dpx.make_grad(losses.dpo))
    got = grad(placed, sharding.shard_batch(batch, mesh), placed)
    assert_close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want), 1e-10)


def test_what_is_split_over_devices():
    """Projections along heads; what `tensor` does not divide stays whole, as do the filters."""
    mesh = sharding.make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4])
    place = sharding.placement(mesh)

    def spec(name, leaf):
        return place(f"layers.recurrence.{name}", leaf).spec

    recurrence = POLICIES["delta"].layers.recurrence
    assert spec("value.weight", recurrence.value.weight) == P(None, "tensor", "fsdp")
    assert spec("rate.weight", recurrence.rate.weight) == P(None, "tensor", "fsdp")
    assert recurrence.query.weight.shape == (1, 3, 8)
    assert spec("query.weight", recurrence.query.weight) == P(None, None, "fsdp")
    assert spec("output.weight", recurrence.output.weight) == P(None, "fsdp", "tensor")
    assert spec("query_filter.weight", np.zeros((4, 8192, 1, 4))) == P(None, None, None, None)
    assert spec("query.up", np.zeros((1, 4, 2))) == P(None, "tensor", None)
    # A vector of Adafactor, for the rows of a matrix.
    assert spec("value.weight", np.zeros((2, 8))) == P()


@pytest.mark.slow
@BOTH
def test_traces_where_what_varies_is_tracked(name):
    policy, batch = POLICIES[name], random_batch(seed=3)
    arrays, static = eqx.partition(policy, eqx.is_array)
    grad = dpx.make_grad(losses.dpo, axis_name="data")

    def on_device(arrays, batch):
        policy = eqx.combine(arrays, static)
        return eqx.filter(grad(policy, batch, policy), eqx.is_array)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    gradients, _ = jax.eval_shape(mapped, arrays, batch)
    assert jax.tree.structure(gradients) == jax.tree.structure(arrays)


def test_configurations_that_do_not_fit():
    with pytest.raises(ValueError, match="`recurrence` is required if a layer is recurrent"):
        models.Config(**SIZES, layers=2, recurrent=(True, False))
    with pytest.raises(ValueError, match="`recurrent` must have one entry per layer, 2; got 1"):
        models.Config(**SIZES, layers=2, recurrence=DELTA, recurrent=(True,))
    with pytest.raises(ValueError, match="`value_heads` must be a multiple of `key_heads`"):
        models.Recurrence(kind="delta", kernel=3, key_heads=2, value_heads=3)
    with pytest.raises(ValueError, match="`kernel` must be positive; got 0"):
        models.Recurrence(kind="convolution", kernel=0)


LFM2, QWEN = {"model_type": "lfm2"}, {"model_type": "qwen3_5_text"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (LFM2 | {"layer_types": ["conv", "mamba"]}, r"`layer_types` may hold .*'mamba'"),
        (LFM2 | {"layer_types": ["conv"]}, "`layer_types` must have one entry per layer"),
        (LFM2 | {"hidden_act": "gelu"}, "`hidden_act`"),
        (LFM2 | {"block_use_swiglu": "no"}, "`block_use_swiglu`"),
        (LFM2 | {"full_attn_idxs": ["a"]}, "`full_attn_idxs` .* must be a list of integers"),
        (QWEN | {"linear_num_key_heads": 5}, "`linear_num_value_heads` must be a multiple"),
        (QWEN | {"mlp_only_layers": [1]}, "`mlp_only_layers`"),
        (QWEN | {"layer_types": ["conv"] * 32}, r"`layer_types` may hold .*'conv'"),
        (QWEN | {"rope_parameters": {"rope_type": "mrope"}}, "of a type in"),
    ],
)
def test_keys_that_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        models.read_config(values)


def test_keys_of_published_files():
    config = models.read_config(
        LFM2
        | {
            "block_dim": 2048,
            "block_ff_dim": 12288,
            "conv_dim": 2048,
            "num_heads": 32,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "tie_embedding": True,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
            "use_pos_enc": True,
            "theta": 1000000.0,
            "block_use_swiglu": True,
            "block_mlp_init_scale": 1.0,
            "conv_use_xavier_init": True,
        }
    )
    assert config.feed_forward == 8192
    assert config.tied
    assert [i for i, own in enumerate(config.recurrent) if not own] == [2, 5, 8, 10, 12, 14]
    config = models.read_config(
        QWEN
        | {
            "attn_output_gate": True,
            "mamba_ssm_dtype": "float32",
            "mlp_only_layers": [],
            "mtp_num_hidden_layers": 1,
            "full_attention_interval": 4,
            "rope_parameters": {"mrope_section": [11, 11, 10], "rope_theta": 10000000},
        }
    )
    assert config.recurrent == (True, True, True, False) * 8
    assert config.rotary.fraction == 0.25
