"""Quantised bases: the formats against NumPy, and what trains, saves and loads on them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx.models._adapters.formats import FORMATS

from .golden import CHECKPOINTS, FOLDER, Perceptron, expected, ragged_batch, shaken

# Appendix E of arXiv 2305.14314.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def int8_by_numpy(weight):
    """Codes and the decoded weight, one row after the other."""
    codes, decoded = np.zeros(weight.shape, np.int64), np.zeros(weight.shape)
    for place in np.ndindex(weight.shape[:-1]):
        row = weight[place].astype(np.float64)
        scale = np.abs(row).max() / 127
        codes[place] = np.rint(row / scale) if scale else 0
        decoded[place] = codes[place] * scale
    return codes, decoded


def nf4_by_numpy(weight):
    """Codes, unpacked, and the decoded weight, one block after the other."""
    codes, decoded = np.zeros(weight.shape, np.int64), np.zeros(weight.shape)
    for place in np.ndindex(weight.shape[:-1]):
        for start in range(0, weight.shape[-1], 64):
            part = (*place, slice(start, start + 64))
            block = weight[part].astype(np.float64)
            scale = np.abs(block).max()
            nearest = np.abs(block[:, None] / (scale or 1) - NF4).argmin(axis=1)
            codes[part], decoded[part] = nearest, NF4[nearest] * scale
    return codes, decoded


encode = {name: eqx.filter_jit(form.encode) for name, form in FORMATS.items()}
decode = eqx.filter_jit(lambda stored: stored.decode())


def unpacked(stored):
    """The codes of an `NF4Weight`, one each."""
    halves = np.stack([stored.codes >> 4, stored.codes & 15], axis=-1)
    return halves.reshape(*stored.codes.shape[:-1], -1)[..., : stored.width]


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 130), (4, 1), (2, 3, 2, 33)])
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_the_format(name, shape):
    """Against NumPy in float64, with rows of zeros and widths that are no whole blocks."""
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight[..., 1, :] = 0
    stored = encode[name](jnp.asarray(weight))
    codes, decoded = (int8_by_numpy if name == "int8" else nf4_by_numpy)(weight)
    assert np.array_equal(stored.codes if name == "int8" else unpacked(stored), codes)
    ours = decode(stored)
    assert np.abs(np.asarray(ours) - decoded).max() < 1e-6
    assert stored.shape == shape
    assert ours.dtype == np.float32
    again = encode[name](ours)
    assert np.array_equal(again.codes, stored.codes)


def test_ties_extremes_and_size():
    values = np.array([[127.0, 0.5, 1.5, -2.5, -127.0, 126.5]], np.float32)
    assert encode["int8"](jnp.asarray(values)).codes.tolist() == [[127, 0, 2, -2, -127, 126]]
    middle = (np.float32(NF4[9]) + np.float32(NF4[10])) / np.float32(2)
    values = np.array([[1.0, middle, np.nextafter(middle, np.float32(1)), -1.0]], np.float32)
    assert unpacked(encode["nf4"](jnp.asarray(values))).tolist() == [[15, 9, 10, 0]]
    for name, limit in (("int8", 1.02), ("nf4", 0.5627)):
        stored = encode[name](np.ones((7, 256), jnp.bfloat16))
        assert sum(x.nbytes for x in jax.tree.leaves(stored)) <= limit * 7 * 256
        assert decode(stored).dtype == jnp.bfloat16
        # What is not a number is not hidden.
        assert np.isnan(decode(encode[name](np.array([[1.0, np.nan]], np.float32)))).any()


def test_nothing_of_it_is_trained():
    policy = models.load(FOLDER / "families" / "llama", quantize="nf4")
    layer = policy.layers.attention.query
    assert isinstance(layer, models.Quantized)
    assert not any(map(eqx.is_inexact_array, jax.tree.leaves(layer)))
    for trainable in (eqx.is_array, lambda x: True):
        with pytest.raises(ValueError, match=r"selects `layers\.attention\.query\.stored\.codes`"):
            dpx.make_grad(losses.dpo, trainable=trainable)(policy, ragged_batch(0), policy)
    adapted = models.add_lora(policy, rank=2, key=jax.random.key(0))
    chosen = jax.tree_util.tree_leaves_with_path(models.lora_filter(adapted))
    names = {
        jax.tree_util.keystr(path, simple=True, separator=".") for path, is_it in chosen if is_it
    }
    assert names
    assert all(name.endswith((".down", ".up")) for name in names)


@eqx.filter_jit
def logits_of(policy, ids):
    return jax.vmap(policy)(ids)


SEVEN = {"llama", "mistral-sliding", "qwen2", "qwen3", "gpt2", "phi", "gemma2"}


@pytest.mark.parametrize("name", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(path, id=path.name, marks=() if path.name == "qwen3" else pytest.mark.slow)
        for path in CHECKPOINTS
        if path.name in SEVEN
    ],
)
def test_loading_quantises_and_logits_are_those_of_the_decoded_weights(folder, name):
    plain = models.load(folder)
    loaded = models.load(folder, quantize=name)
    want = models.quantize(plain, name)
    assert jax.tree.structure(loaded) == jax.tree.structure(want)
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(want)))
    assert loaded.unembedding.dtype == np.float32
    decoded = models.merge_lora(loaded)
    assert jax.tree.structure(decoded) == jax.tree.structure(plain)
    ids, mask, exact = expected(folder)
    logits = logits_of(loaded, ids)
    assert np.abs(logits - logits_of(decoded, ids)).max() < 1e-5
    error = np.abs(np.asarray(logits) - exact)[mask].max()
    assert (1e-3 if name == "int8" else 0.05) < error < (0.2 if name == "int8" else 2.5)


MESH = sharding.make_mesh("data=2,fsdp=2,tensor=2")


def test_sharded_loading_is_the_same():
    folder = FOLDER / "families" / "llama"
    place = sharding.placement(MESH)
    loaded = models.load(folder, quantize="nf4", sharding=place, dtype=jnp.bfloat16)
    want = models.quantize(models.load(folder, dtype=jnp.bfloat16), "nf4")
    assert all(map(np.array_equal, jax.tree.leaves(loaded), jax.tree.leaves(want)))
    assert loaded.layers.feed_forward.up.stored.codes.sharding.spec == jax.P(None, "tensor", "fsdp")


@pytest.fixture(scope="module", params=[pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def quantised(request):
    """A policy with biases, quantised, with adapters that are not zero."""
    base = models.load(FOLDER / "families" / "qwen2", quantize=request.param)
    return shaken(models.add_lora(base, rank=3, key=jax.random.key(0)))


@eqx.filter_jit
def gradients_of(policy, batch):
    grad = dpx.make_grad(
        losses.dpo, trainable=models.lora_filter(policy), reference_of=models.without_lora
    )
    return grad(policy, batch)


@pytest.mark.slow
def test_gradients_are_those_on_the_decoded_weights(quantised):
    batch = ragged_batch(0)
    got, metrics = gradients_of(quantised, batch)
    want, same = gradients_of(models.dequantize(quantised), batch)
    got, want = (jax.tree.leaves(tree) for tree in (got, want))
    assert len(got) == len(want) == 14
    largest = max(np.abs(x).max() for x in want)
    assert largest > 1e-3
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(ours - theirs).max() < 1e-6 * max(1, largest)
    assert abs(metrics["loss"] - same["loss"]) < 1e-6
    assert metrics["grad_norm"] > 0


@pytest.mark.slow
def test_over_a_mesh(quantised):
    """Codes and scales are split as the weights would be; the gradients are those of one device."""
    placed = sharding.shard_policy(models.pin_lora(quantised), MESH)
    attention = placed.layers.attention
    for layer, axes in (
        (attention.query, ("tensor", "fsdp")),
        (attention.output, ("fsdp", "tensor")),
    ):
        stored = layer.base.stored
        assert stored.codes.sharding.spec == jax.P(None, *axes)
        assert stored.codes.addressable_shards[0].data.size == stored.codes.size // 4
        assert stored.scales.sharding.spec[:2] == (None, axes[0])
    assert attention.query.base.layer.bias.sharding.spec == jax.P(None, "tensor")
    assert attention.query.pinned[1].sharding == attention.query.up.sharding
    assert attention.output.pinned[0].sharding == attention.output.down.sharding

    batch = ragged_batch(0)
    want, metrics = gradients_of(quantised, batch)
    four_times = jax.tree.map(lambda x: np.concatenate([x] * 4), batch)
    got, same = gradients_of(placed, sharding.shard_batch(four_times, MESH))
    for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert np.abs(ours - theirs).max() < 1e-6
    assert abs(metrics["loss"] - same["loss"]) < 1e-6


def test_merging_decodes(quantised):
    merged = models.merge_lora(quantised)
    assert not any(x.dtype == np.uint8 for x in jax.tree.leaves(merged))
    ids = np.arange(3, 15)[None]
    assert np.abs(logits_of(merged, ids) - logits_of(quantised, ids)).max() < 1e-5


def test_saving_needs_merging(quantised, tmp_path):
    for policy in (quantised, models.without_lora(quantised)):
        with pytest.raises(ValueError, match=r"has quantised layers.*`models.merge_lora`"):
            models.save(policy, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    models.save(models.merge_lora(quantised), tmp_path / "saved")
    ids = np.arange(3, 15)[None]
    loaded = models.load(tmp_path / "saved")
    assert np.abs(logits_of(loaded, ids) - logits_of(quantised, ids)).max() < 1e-5


def perceptron():
    return Perceptron(
        jax.random.normal(jax.random.key(0), (7, 5), jnp.float32),
        eqx.nn.MLP(5, 7, 70, 2, key=jax.random.key(1), dtype=jnp.float32),
    )


@pytest.mark.parametrize("name", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_any_equinox_module(name):
    """The bias stays and may be trained; adapters go on top, or below."""
    policy, ids = perceptron(), jnp.arange(7)
    small = models.quantize(policy, name, target=r"layers\[?\.?[01]")
    layers = small.mlp.layers
    assert [isinstance(layer, models.Quantized) for layer in layers] == [True, True, False]
    decoded = models.dequantize(small)
    assert jax.tree.structure(decoded) == jax.tree.structure(policy)

    @eqx.filter_jit
    def loss_and_slopes(policy):
        return eqx.filter_value_and_grad(lambda policy: (policy(ids) ** 2).sum())(policy)

    (got, slopes), (want, theirs) = loss_and_slopes(small), loss_and_slopes(decoded)
    assert abs(got - want) < 1e-5 * want
    ours = slopes.mlp.layers[0]
    assert ours.stored.codes is None
    assert np.allclose(ours.layer.bias, theirs.mlp.layers[0].bias, rtol=1e-5)
    assert np.allclose(slopes.embedding, theirs.embedding, rtol=1e-4, atol=1e-5)

    above = models.add_lora(small, rank=2, key=jax.random.key(2))
    below = models.quantize(models.add_lora(policy, rank=2, key=jax.random.key(2)), name)
    for adapted in (above, below):
        assert isinstance(adapted.mlp.layers[0], models.LoRA)
        assert isinstance(adapted.mlp.layers[0].base, models.Quantized)


@pytest.mark.slow
def test_a_step_in_bfloat16_changes_adapters_only():
    base = models.load(FOLDER / "families" / "qwen3", dtype=jnp.bfloat16, quantize="int8")
    policy = models.add_lora(base, rank=2, key=jax.random.key(0))
    trainable = models.lora_filter(policy)
    optimizer = optax.sgd(0.1)
    step = dpx.make_step(
        losses.dpo, optimizer, trainable=trainable, reference_of=models.without_lora
    )
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    trained, _, metrics = eqx.filter_jit(step)(policy, opt_state, ragged_batch(0))
    assert abs(metrics["loss"] - np.log(2)) < 1e-5
    for before, after, learns in zip(
        *map(jax.tree.leaves, (policy, trained, trainable)), strict=True
    ):
        assert before.dtype == after.dtype
        assert learns or np.array_equal(before, after)
    assert np.any(trained.layers.attention.query.up)


class Stack(eqx.Module):
    """Layers of a user's own, stacked and run by `lax.scan`."""

    layers: eqx.Module

    def __call__(self, x):
        arrays, static = eqx.partition(self.layers, eqx.is_array)

        def body(x, layer):
            return jnp.tanh(jax.vmap(eqx.combine(layer, static))(x)), None

        return jax.lax.scan(body, x, arrays)[0]


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_one_layers_weight_at_a_time(name):
    """In the backward pass, four more layers need less room than the weight of one of them."""

    def temporaries(count):
        def make(key):
            keys = jax.random.split(key, count)
            linear = functools.partial(eqx.nn.Linear, 512, 512, dtype=jnp.float32)
            stack = Stack(eqx.filter_vmap(lambda key: linear(key=key))(keys))
            policy = models.quantize(stack, name)
            return models.add_lora(policy, rank=1, key=key)

        policy = eqx.filter_eval_shape(make, jax.random.key(0))
        shapes, static = eqx.partition(policy, lambda x: isinstance(x, jax.ShapeDtypeStruct))
        trainable = models.lora_filter(policy)

        def slopes(arrays, x):
            own, frozen = eqx.partition(eqx.combine(arrays, static), trainable)
            grad = eqx.filter_grad(lambda own: (eqx.combine(own, frozen)(x) ** 2).sum())
            return jax.tree.leaves(grad(own))

        x = jax.ShapeDtypeStruct((4, 512), jnp.float32)
        compiled = jax.jit(slopes).lower(shapes, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(6) - temporaries(2) < 4 * 512 * 512


def test_errors():
    policy = perceptron()
    with pytest.raises(ValueError, match="`format` must be one of int8, nf4; got 'int4'"):
        models.quantize(policy, "int4")
    with pytest.raises(ValueError, match="`quantize` must be one of int8, nf4; got 'fp8'"):
        models.load(FOLDER / "families" / "llama", quantize="fp8")
    with pytest.raises(ValueError, match=r"nothing to quantise in `policy`.*'zzz' matches none"):
        models.quantize(policy, "int8", target="zzz")
    with pytest.raises(ValueError, match=r"nothing to quantise in `policy`.*There are: none"):
        models.quantize(eqx.nn.LayerNorm(3), "nf4")
    with pytest.raises(ValueError, match=r"the default, all but the unembedding, matches none"):
        models.quantize(models.quantize(policy, "nf4"), "nf4")
