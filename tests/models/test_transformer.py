"""The decoder as a policy: depth and windows, dropout, rematerialisation, dtypes, `shard_map`."""

import dataclasses
from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses, models

from ..policies import as_users_compile, random_batch
from .golden import FOLDER, ragged_batch

CONFIG = models.Config(
    vocab=96, width=16, layers=3, heads=4, key_heads=2, windows=(3, None, 3), query_key_norm=True
)
IDS = jnp.arange(20)
SIZES = {"vocab": 96, "width": 96, "layers": 2, "heads": 4}
GPT = {"norm": "layer", "gated": False, "query_bias": True, "feed_forward_bias": True}


@pytest.fixture(scope="module")
def policy():
    return models.Transformer(CONFIG, key=jax.random.key(0))


def with_config(policy, **changes):
    """The same parameters under another configuration."""
    config = dataclasses.replace(policy.config, **changes)
    skeleton = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(skeleton), jax.tree.leaves(policy))


@eqx.filter_jit
def call(policy, ids, key=None):
    return policy(ids, key=key)


def gradient(policy, batch, **settings):
    grad = dpx.make_grad(losses.dpo, **settings)
    return eqx.filter_jit(grad)(policy, batch, dpx.snapshot(policy))


def test_starts_near_uniform(policy):
    logits = call(policy, IDS)
    assert logits.shape == (20, 96)
    assert isinstance(policy, dpx.FastPolicy)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    assert np.all(-np.sum(np.exp(log_probs) * log_probs, axis=-1) > 0.95 * np.log(96))


def test_layers_are_stacked(policy):
    assert policy.layers.attention.query.weight.shape == (3, 16, 16)
    assert policy.layers.attention.key_norm.weight.shape == (3, 4)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(policy.layers))


def test_program_does_not_grow_with_depth(policy):
    def lines(layers):
        config = dataclasses.replace(CONFIG, layers=layers, windows=(3, None) * (layers // 2))
        policy = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
        return len(str(eqx.filter_make_jaxpr(lambda p, ids: p(ids))(policy, IDS)[0]).splitlines())

    assert lines(4) == lines(28)


def test_an_unrolled_program_grows_with_depth():
    def lines(layers, unroll):
        windows = (3, None) * (layers // 2)
        config = dataclasses.replace(CONFIG, layers=layers, windows=windows, unroll=unroll)
        shapes = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
        policy = jax.tree.map(jnp.zeros_like, shapes)
        lowered = eqx.filter_jit(lambda policy, ids: policy(ids)).lower(policy, IDS)
        return len(lowered.as_text().splitlines())

    assert lines(2, False) == lines(4, False)
    assert lines(2, True) < lines(4, True)


@pytest.mark.slow
@pytest.mark.parametrize("how", [("remat",), ("unroll",), ("remat", "unroll")])
def test_how_layers_run_changes_nothing(policy, how):
    batch = ragged_batch(0)
    want, _ = gradient(policy, batch)
    got, _ = gradient(with_config(policy, **dict.fromkeys(how, True)), batch)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() < 1e-6


def test_dropout_applies_with_a_key_only():
    policy = models.load(FOLDER / "traces" / "gpt2" / "model")
    assert policy.config.residual_dropout == 0.1
    plain = call(policy, IDS)
    first, again, second = (call(policy, IDS, jax.random.key(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.abs(first - second).max() > 0.1
    assert np.abs(first - plain).max() > 0.1


def test_float64_is_float64_throughout(policy):
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), policy)
    jaxpr = str(jax.make_jaxpr(lambda ids: wide(ids))(IDS))
    assert "f32" not in jaxpr


def test_bf16_keeps_its_residual_stream(policy):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)
    layout = dpx.Layout(jnp.asarray(20), 20, ())
    hidden = eqx.filter_eval_shape(lambda policy: policy.hidden(IDS, layout), narrow)
    assert hidden.dtype == jnp.bfloat16
    logits = call(narrow, IDS)
    assert logits.dtype == jnp.float32
    # A few roundings of 2^-8 each, on logits of at most 0.4 that are sums of larger terms.
    assert np.abs(logits - call(policy, IDS)).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "microbatches", "dtype"),
    [
        ({}, 1, None),
        pytest.param({}, 1, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param({"layers": 1}, 1, None, marks=pytest.mark.slow),
        pytest.param({"attention_softcap": 20.0}, 4, None, marks=pytest.mark.slow),
        pytest.param({"remat": True}, 4, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param({"unroll": True}, 1, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param({**GPT, "tied": False}, 2, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param({"query_key_norm": True}, 1, jnp.float16, marks=pytest.mark.slow),
    ],
)
def test_the_first_margins_are_zero_to_the_last_bit(kind, microbatches, dtype):
    policy = models.Transformer(models.Config(**{**SIZES, **kind}), key=jax.random.key(0))
    batch = random_batch(pairs=32, prompt=16, completion=24, weight=None)
    precompute = partial(dpx.precompute_reference, compute_dtype=dtype)
    log_probs = as_users_compile(precompute, policy, batch)
    grad = dpx.make_grad(losses.dpo, microbatches=microbatches, compute_dtype=dtype)
    _, live = as_users_compile(grad, policy, batch, dpx.snapshot(policy))
    precomputed = dataclasses.replace(batch, reference=log_probs)
    for metrics in live, as_users_compile(grad, policy, precomputed)[1]:
        assert metrics["rewards/margins"] == 0
        assert metrics["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("kind", [{}, GPT, {"query_key_norm": True}], ids=["llama", "gpt", "qk"])
@pytest.mark.parametrize("rank", [None, 2])
def test_products_in_half_precision_are_rounded_at_once(kind, rank):
    """A GPU showed what happens otherwise; the compiler for a CPU rounds alike anyway."""
    policy = models.Transformer(models.Config(**{**SIZES, **kind}), key=jax.random.key(0))
    policy = policy if rank is None else models.add_lora(policy, rank=rank, key=jax.random.key(1))

    floats, static = eqx.partition(policy, eqx.is_inexact_array)

    def hidden(floats, ids):
        layout = dpx.Layout(jnp.asarray(20), 20, ())
        return eqx.combine(floats, static).hidden(ids, layout)

    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), floats)
    found = products_with_weights(jax.make_jaxpr(hidden)(narrow, IDS).jaxpr)
    assert len(found) == (7 if kind != GPT else 6) * (1 if rank is None else 3)
    assert set(found) == {"optimization_barrier"}


def products_with_weights(jaxpr):
    """The primitive that takes the result of each product without batch axes."""
    found = []
    for i, equation in enumerate(jaxpr.eqns):
        values = jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_jaxpr)
        for each in filter(is_jaxpr, values):
            found += products_with_weights(getattr(each, "jaxpr", each))
        if equation.primitive.name == "dot_general":
            has_batch = equation.params["dimension_numbers"][1] != ((), ())
            users = [e for e in jaxpr.eqns[i:] if equation.outvars[0] in e.invars]
            found += [] if has_batch else [user.primitive.name for user in users]
    return found


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.slow
def test_first_step_in_bf16_compute_is_log_2(policy):
    _, metrics = gradient(policy, ragged_batch(0), compute_dtype=jnp.bfloat16)
    assert abs(metrics["loss"] - np.log(2)) < 1e-5


@pytest.mark.slow
def test_traces_inside_shard_map(policy):
    """Also with the check of what varies; gradients of replicated parameters are then summed."""
    batch = jax.tree.map(lambda *rows: jnp.concatenate(rows), *(ragged_batch(i) for i in range(8)))
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), with_config(policy, remat=True))
    params, static = eqx.partition(wide, eqx.is_array)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.grad
    def gradient(params, batch):
        return dpx.score_pairs(eqx.combine(params, static), batch).chosen.sum()

    sharded = jax.shard_map(
        gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=True
    )
    got, want = jax.jit(sharded)(params, batch), jax.jit(gradient)(params, batch)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() < 1e-9


def test_learned_positions_run_out():
    policy = models.load(FOLDER / "families" / "gpt2")
    with pytest.raises(ValueError, match="at most 256 tokens; got a row of up to 257"):
        policy(np.zeros(257, np.int64))


def learned(max_length):
    """A decoder with this many learned positions; the first ones are the same for each number."""
    config = models.Config(vocab=31, width=8, layers=1, heads=2, rotary=None, max_length=max_length)
    policy = models.Transformer(config, key=jax.random.key(0))
    # Large and all different, so that a wrong position shows.
    table = jax.random.normal(jax.random.key(1), (12, 8))
    return eqx.tree_at(lambda p: p.positions.weight, policy, table[:max_length])


def padded_pair(prompt, chosen, rejected, more):
    """A batch of one pair with so many tokens, and `more` columns of padding in each part."""
    width = max(chosen, rejected) + more
    widths = ((prompt, prompt + more), (chosen, width), (rejected, width))
    parts = [np.arange(w) * 7 % 31 for _, w in widths]
    masks = [np.arange(w) < n for n, w in widths]
    return dpx.PreferenceBatch(
        *(dpx.Tokens(ids[None], mask[None]) for ids, mask in zip(parts, masks, strict=True))
    )


@pytest.mark.slow
def test_padding_needs_no_learned_position():
    """A row of exactly as many tokens as there are positions, padded far beyond them."""
    policy, tokens = learned(8), (3, 5, 2)

    @eqx.filter_jit
    def value_and_gradient(policy, batch):
        def total(policy):
            log_probs = dpx.score_pairs(policy, batch)
            return (log_probs.chosen - log_probs.rejected).sum(), log_probs

        return eqx.filter_value_and_grad(total, has_aux=True)(policy)

    (_, want), want_slope = value_and_gradient(policy, padded_pair(*tokens, 0))
    (_, got), slope = value_and_gradient(policy, padded_pair(*tokens, 16))
    chex.assert_tree_all_finite(slope)
    np.testing.assert_allclose(got.chosen, want.chosen, rtol=1e-5)
    np.testing.assert_allclose(got.rejected, want.rejected, rtol=1e-5)
    arrays = (eqx.filter(x, eqx.is_array) for x in (slope, want_slope))
    chex.assert_trees_all_close(*arrays, rtol=1e-4, atol=1e-5)


def test_a_row_without_enough_learned_positions_is_nan():
    """The rows are only known at run time; a row beside them that fits is right."""
    # Of 7 tokens the last one is predicted, but nothing is predicted from it.
    rows = [padded_pair(5, 3, 2, 2), padded_pair(5, 2, 3, 2)]
    batch = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    batch = eqx.tree_at(lambda b: b.rejected.mask, batch, batch.rejected.mask & (np.arange(5) < 2))
    score = eqx.filter_jit(dpx.score_pairs)
    got, want = (score(learned(n), batch).chosen for n in (6, 12))
    assert np.isnan(got[0])
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)


def test_errors():
    sizes = {"vocab": 9, "width": 8, "layers": 2, "heads": 4}
    with pytest.raises(ValueError, match="`width` must be positive; got 0"):
        models.Config(**{**sizes, "width": 0})
    with pytest.raises(ValueError, match="`heads` must be a multiple of `key_heads`; got 4 and 3"):
        models.Config(**sizes, key_heads=3)
    with pytest.raises(ValueError, match="`windows` must have one entry per layer, 2; got 1"):
        models.Config(**sizes, windows=(3,))
    with pytest.raises(
        ValueError, match="`head_width` must be even if the whole of a head is rotated; got 3"
    ):
        models.Config(**sizes, head_width=3)


def test_narrow_layers_are_read_one_at_a_time(policy):
    """Under rematerialisation no copy of the whole stack is widened."""
    narrow = with_config(jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy), remat=True)
    compiled = eqx.filter_jit(lambda policy: policy(IDS)).lower(narrow).compile().compiled
    assert "bf16[3,64,16]" in compiled.as_text()
    assert "f32[3,64,16]" not in compiled.as_text()


@pytest.mark.slow
def test_gradients_of_narrow_layers(policy):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)
    grad = eqx.filter_jit(eqx.filter_grad(lambda policy: policy(IDS)[:, 3].sum()))
    want, got = grad(narrow), grad(with_config(narrow, remat=True))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        assert np.abs(a - b).max() < 0.05 * (1 + np.abs(b).max())
        assert np.any(a)
