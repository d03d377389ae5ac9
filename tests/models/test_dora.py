"""Adapters with magnitudes (DoRA): values and gradients, where they start, and their files."""

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
from dpo_eqx._jax.dtypes import in_dtype
from dpo_eqx.models._checkpoint.folder import ADAPTER, ADAPTER_CONFIG

from .golden import FOLDER, call, ragged_batch, shaken

IDS = np.arange(3, 15)
KEY = jax.random.key(5)


def with_dora(base, **given):
    return models.add_lora(base, **{"rank": 2, "dora": True, "key": jax.random.key(0), **given})


@pytest.fixture(scope="module")
def base():
    return models.load(FOLDER / "families" / "gpt2")


def one_layer(dropout=0.0):
    layer = eqx.nn.Linear(6, 4, key=KEY, dtype=jnp.float64)
    return layer, shaken(with_dora(layer, alpha=6, dropout=dropout))


def oracle(lora, first, x, read):
    """The output of one layer, and its gradient for a cotangent of ones, in NumPy."""
    weight, bias, down, up = (
        np.asarray(array) for array in (lora.base.weight, lora.base.bias, lora.down, lora.up)
    )
    together = weight + 3 * up @ down
    norms = np.sqrt((together**2).sum(axis=1))
    ratio = (first + np.asarray(lora.magnitude.change)) / norms
    y = weight @ x + bias + (ratio - 1) * (weight @ read) + ratio * (3 * up @ (down @ read))
    # The norm is a constant, as in section 4.3.
    slopes = (
        3 * np.outer(up.T @ ratio, read),
        3 * np.outer(ratio, down @ read),
        together @ read / norms,
    )
    return y, slopes


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_values_and_gradients(dropout):
    layer, lora = one_layer(dropout)
    x = np.random.default_rng(0).normal(size=6)
    kept = np.asarray(jax.random.bernoulli(KEY, 1 - dropout, (6,)))
    first = np.sqrt((np.asarray(layer.weight) ** 2).sum(axis=1))
    y, slopes = oracle(lora, first, x, np.where(kept, x / (1 - dropout), 0))

    @eqx.filter_jit
    def run(lora, x):
        trained, frozen = eqx.partition(lora, models.lora_filter(lora))

        def total(trained):
            y = eqx.combine(trained, frozen)(x, key=KEY)
            return y.sum(), y

        (_, y), slopes = eqx.filter_value_and_grad(total, has_aux=True)(trained)
        return y, slopes

    got, grads = run(lora, jnp.asarray(x))
    assert np.abs(got - y).max() < 1e-12
    for ours, want in zip(grads.trained, slopes, strict=True):
        assert np.abs(ours - want).max() < 1e-12
        assert np.abs(want).max() > 1e-3
    # Without dropout, the rows of the weight have the trained lengths.
    lengths = np.sqrt((np.asarray(lora.weight) ** 2).sum(axis=1))
    assert np.abs(lengths - (first + np.asarray(lora.magnitude.change))).max() < 1e-12


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_starts_as_the_base(base, dtype):
    """Also if the base was cast to another dtype than its lengths were computed in."""
    policy = in_dtype(with_dora(base), dtype)
    assert np.array_equal(call(policy, IDS), call(in_dtype(base, dtype), IDS))


def test_merged_equals_unmerged(base):
    policy = shaken(with_dora(base, target="query"))
    merged = models.merge_lora(policy)
    want = call(policy, IDS)
    assert np.abs(want - call(base, IDS)).max() > 1e-2
    assert np.abs(call(merged, IDS) - want).max() < 1e-5
    assert jax.tree.structure(models.without_lora(policy)) == jax.tree.structure(base)
    view = models.without_lora(policy)
    assert all(map(lambda x, y: x is y, jax.tree.leaves(view), jax.tree.leaves(base)))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_on_a_quantised_base(kind):
    layer = models.quantize({"a": eqx.nn.Linear(70, 4, key=KEY, dtype=jnp.float32)}, kind)
    lora = with_dora(layer)["a"]
    x = jax.random.normal(KEY, (70,), jnp.float32)
    assert np.array_equal(lora(x), layer["a"](x))
    want = np.linalg.norm(np.asarray(layer["a"].weight), axis=-1)
    assert np.abs(lora.magnitude.first - want).max() < 1e-6
    lora = shaken(lora)
    merged = models.merge_lora(lora)
    assert np.abs(merged(x) - lora(x)).max() < 1e-5
    assert np.abs(merged(x) - layer["a"](x)).max() > 1e-2


def test_what_is_pinned_keeps_its_lengths():
    _, lora = one_layer()
    pinned = models.pin_lora(lora)
    moved = pinned.with_trained(tuple(x + 1 for x in pinned.trained))
    x = jnp.arange(6.0, dtype=jnp.float64)
    assert np.array_equal(models.pinned_lora(moved)(x), lora(x))
    assert np.abs(moved(x) - lora(x)).max() > 0.1


def test_a_row_of_zeros_has_no_length():
    layer, _ = one_layer()
    layer = eqx.tree_at(lambda x: x.weight, layer, layer.weight.at[1].set(0))
    fresh = with_dora(layer, alpha=6)
    x = jnp.arange(6.0, dtype=jnp.float64)
    assert np.array_equal(fresh(x), layer(x))
    lora = shaken(fresh)
    assert np.isfinite(lora(x)).all()
    assert np.abs(lora(x) - lora.weight @ x - lora.bias).max() < 1e-12
    term = 3 * lora.up[1] @ (lora.down @ x)
    assert abs(lora(x)[1] - term - layer.bias[1]) < 1e-12, "an adapter without a length"
    slopes = eqx.filter_grad(lambda lora: lora(x).sum())(lora)
    assert slopes.magnitude.change[1] == 0
    assert np.abs(slopes.magnitude.change[0]) > 0


@pytest.mark.slow
def test_layers_without_adapters_stay_without():
    """PEFT's `layers_to_transform`: the lengths of other layers in the stack do not change."""
    own = models.load(FOLDER / "families" / "qwen2-tied")
    policy = models.load_lora(own, FOLDER / "peft" / "dora")
    change = policy.layers.attention.query.magnitude.change
    assert not np.any(change[0])
    assert np.all(change[1] != 0)

    @eqx.filter_jit
    def slopes(policy):
        trained, frozen = eqx.partition(policy, models.lora_filter(policy))

        def total(trained):
            return jnp.sum(eqx.combine(trained, frozen)(IDS) ** 2)

        return jax.grad(total)(trained).layers.attention.query

    grads = slopes(policy)
    for array in grads.trained:
        assert not np.any(array[0])
        assert np.any(array[1])


@pytest.mark.parametrize("target", [r"attention\.query", r"attention\.(query|key|value)"])
def test_a_part_of_a_fused_layer(base, target, tmp_path):
    policy = shaken(with_dora(base, target=target))
    models.save_lora(policy, tmp_path)
    stored = load_file(tmp_path / ADAPTER)
    name = "base_model.model.transformer.h.1.attn.c_attn"
    lengths = stored[f"{name}.lora_magnitude_vector"]
    attention = models.merge_lora(policy).layers.attention
    parts = attention.query, attention.key, attention.value
    want = np.concatenate([np.linalg.norm(np.asarray(part.weight[1]), axis=-1) for part in parts])
    assert np.abs(lengths - want).max() < 1e-6
    again = models.load_lora(base, tmp_path)
    assert jax.tree.structure(again) == jax.tree.structure(policy)
    assert np.abs(call(again, IDS) - call(policy, IDS)).max() < 1e-5


def test_a_file_has_lengths_for_all_layers_or_for_none(base, tmp_path):
    """A layer without magnitudes gets those that it has anyway."""
    policy = shaken(with_dora(base, target="query|down"))
    down = policy.layers.feed_forward.down
    without = models.LoRA(down.base, down.down, down.up, down.scale)
    policy = eqx.tree_at(lambda p: p.layers.feed_forward.down, policy, without)
    models.save_lora(policy, tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["use_dora"]
    again = models.load_lora(base, tmp_path)
    assert again.layers.feed_forward.down.magnitude is not None
    assert np.abs(call(again, IDS) - call(policy, IDS)).max() < 1e-5
    alone = eqx.filter(policy, models.lora_filter(policy))
    with pytest.raises(ValueError, match=r"must hold the weight of 'layers\..*Give the whole"):
        models.save_lora(alone, tmp_path)


def test_files_of_another_module_have_the_same_bits(tmp_path):
    layer, lora = one_layer()
    models.save_lora({"a": lora}, tmp_path)
    for start in (layer, with_dora(layer, alpha=6)):
        again = models.load_lora({"a": start}, tmp_path)
        assert jax.tree.structure(again) == jax.tree.structure({"a": lora})
        assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves({"a": lora})))
    with pytest.raises(ValueError, match=r"magnitudes \(DoRA\) at 'a' in either the file or"):
        models.load_lora({"a": models.add_lora(layer, rank=2, alpha=6, key=KEY)}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_step_starts_at_log_2_and_trains_lengths(base, dtype):
    policy = with_dora(base)
    trainable, optimizer = models.lora_filter(policy), optax.sgd(0.1)
    step = dpx.make_step(
        losses.dpo,
        optimizer,
        trainable=trainable,
        reference_of=models.without_lora,
        compute_dtype=dtype,
    )
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    trained, _, metrics = eqx.filter_jit(step)(policy, opt_state, ragged_batch(0))
    assert abs(metrics["loss"] - np.log(2)) < (1e-6 if dtype is None else 1e-5)
    query = trained.layers.attention.query.magnitude
    assert np.any(query.change)
    assert np.array_equal(query.start, policy.layers.attention.query.magnitude.start)
