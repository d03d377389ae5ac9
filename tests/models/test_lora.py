"""Adapters: where they go, what they change, and what the views of a policy with them are."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models

from .golden import FOLDER, Perceptron, ragged_batch, shaken

IDS = np.arange(3, 15)


@pytest.fixture(scope="module")
def base():
    return models.load(FOLDER / "families" / "llama")


@pytest.fixture(scope="module")
def adapted(base):
    """With adapters that are not zero."""
    policy = models.add_lora(base, rank=4, key=jax.random.key(0))
    return shaken(policy)


@eqx.filter_jit
def call(policy, ids):
    return policy(ids)


def test_starts_as_the_base(base):
    policy = models.add_lora(base, rank=4, key=jax.random.key(0))
    layer = policy.layers.attention.query
    assert not np.any(layer.up)
    assert np.all(np.std(layer.down, axis=(1, 2)) > 0.01)
    assert not np.array_equal(layer.down[0], layer.down[1])
    assert np.array_equal(call(policy, IDS), call(base, IDS))


def test_default_is_all_but_the_unembedding(base):
    policy = models.add_lora(base, rank=4, key=jax.random.key(0))
    assert policy.head is base.head
    layers = policy.layers
    for layer in (
        *(layers.attention.query, layers.attention.key, layers.attention.value),
        *(layers.attention.output, layers.feed_forward.gate),
        *(layers.feed_forward.up, layers.feed_forward.down),
    ):
        assert isinstance(layer, models.LoRA)
    assert layers.attention.query.down.shape == (2, 4, 32)
    assert layers.attention.key.up.shape == (2, 16, 4)


def test_target_is_searched_in_the_path(base):
    policy = models.add_lora(base, rank=2, target=r"(query|value)\.weight$", key=jax.random.key(0))
    assert isinstance(policy.layers.attention.query, models.LoRA)
    assert isinstance(policy.layers.attention.value, models.LoRA)
    assert policy.layers.attention.key.weight is base.layers.attention.key.weight
    assert sum(jax.tree.leaves(models.lora_filter(policy))) == 4


def test_rank_stabilised(base):
    given = {"rank": 4, "alpha": 6, "target": "query", "key": jax.random.key(0)}
    assert models.add_lora(base, **given).layers.attention.query.scale == 1.5
    policy = models.add_lora(base, rank_stabilised=True, **given)
    assert policy.layers.attention.query.scale == 3.0


def test_view_without_adapters_is_the_base_itself(base, adapted):
    view = models.without_lora(adapted)
    assert jax.tree.structure(view) == jax.tree.structure(base)
    assert all(x is y for x, y in zip(jax.tree.leaves(view), jax.tree.leaves(base), strict=True))


def test_merged_equals_unmerged(base, adapted):
    merged = models.merge_lora(adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    want = call(adapted, IDS)
    assert np.abs(want - call(base, IDS)).max() > 0.1
    assert np.abs(call(merged, IDS) - want).max() < 1e-5


def test_adapter_of_the_unembedding_is_seen_by_the_fast_path(base):
    policy = shaken(models.add_lora(base, rank=2, target="head", key=jax.random.key(0)))
    merged = models.merge_lora(policy)
    assert np.abs(call(policy, IDS) - call(merged, IDS)).max() < 1e-5
    assert np.abs(policy.unembedding - merged.unembedding).max() < 1e-6
    assert np.abs(policy.unembedding - base.unembedding).max() > 0.01


def test_any_equinox_module():
    key = jax.random.key(0)
    policy = Perceptron(
        jax.random.normal(key, (7, 5), jnp.float32),
        eqx.nn.MLP(5, 7, 6, 2, key=key, dtype=jnp.float32),
    )
    adapted = shaken(models.add_lora(policy, rank=2, target="layers", key=key))
    assert sum(jax.tree.leaves(models.lora_filter(adapted))) == 6
    ids = jnp.arange(7)
    merged = models.merge_lora(adapted)
    logits = call(adapted, ids)
    assert np.abs(logits - call(policy, ids)).max() > 1e-3
    assert np.abs(logits - call(merged, ids)).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_step_changes_adapters_only(dtype):
    base = models.load(FOLDER / "families" / "qwen3", dtype=dtype)
    policy = models.add_lora(base, rank=4, key=jax.random.key(0))
    trainable = models.lora_filter(policy)
    optimizer = optax.sgd(0.1)
    step = dpx.make_step(
        losses.dpo, optimizer, trainable=trainable, reference_of=models.without_lora
    )
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    trained, _, metrics = eqx.filter_jit(step)(policy, opt_state, ragged_batch(0))
    assert abs(metrics["loss"] - np.log(2)) < (1e-6 if dtype == jnp.float32 else 1e-5)
    for before, after, learns in zip(
        *map(jax.tree.leaves, (policy, trained, trainable)), strict=True
    ):
        assert before.dtype == after.dtype
        assert learns or np.array_equal(before, after)
    # B is zero at first, and A's gradient with it.
    assert np.any(trained.layers.attention.query.up)
    assert trained.layers.attention.query.up.dtype == jnp.float32


def test_errors(base, adapted):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"'nothing' matches none. There are: head.weight, layers"):
        models.add_lora(base, rank=4, target="nothing", key=key)
    with pytest.raises(ValueError, match="`rank` must be positive; got 0"):
        models.add_lora(base, rank=0, key=key)
    with pytest.raises(ValueError, match="`alpha` must be positive; got nan"):
        models.add_lora(base, rank=1, alpha=float("nan"), key=key)
    with pytest.raises(ValueError, match="has adapters already"):
        models.add_lora(adapted, rank=4, key=key)
    with pytest.raises(ValueError, match="has no adapters to select"):
        models.lora_filter(base)


def test_saving_needs_merging(adapted, tmp_path):
    with pytest.raises(ValueError, match=r"no place for 'layers\..*merge_lora"):
        models.save(adapted, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
