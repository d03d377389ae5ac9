"""Attention through cuDNN's kernel, as far as can be seen without a GPU.

What is ours, the gradient, the padding and the merging of batches, runs here on JAX's own attention
in the kernel's place. Whole steps are lowered for a GPU, to see how often the kernel is called.
"""

import re
from functools import partial
from types import ModuleType

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx._arrays.layout import Layout
from dpo_eqx._jax import platform_rules
from dpo_eqx.models._decoder import fused, kernels, sequences
from dpo_eqx.models._decoder.attention import attend, attend_by_layout, masks

from ..policies import assert_close, random_batch

SIZES = {"vocab": 96, "width": 32, "layers": 2, "heads": 4, "key_heads": 2}
BOUND = 1e-6  # JAX's attention has a softmax in float32.


@pytest.fixture
def in_place_of_the_kernel(monkeypatch, standard_promotion):
    module = ModuleType("in_place_of_the_kernel")
    names = ("attention", "tracing", "prefers_sequences")
    vars(module).update({name: getattr(fused, name) for name in names}, fits=lambda *_: True)
    monkeypatch.setattr(fused, "IMPLEMENTATION", "xla")
    monkeypatch.setitem(kernels.KERNELS, "cpu", module)
    platform_rules._run_now.clear_cache()
    yield
    platform_rules._run_now.clear_cache()


def policy_of(**settings):
    policy = models.Transformer(models.Config(**{**SIZES, **settings}), key=jax.random.key(0))
    return jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, policy)


def operands(query=5, key=7, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    shapes = (2, query, 4, 8), (2, key, 2, 8), (2, key, 2, 8)
    return [jnp.asarray(rng.normal(size=(3, *shape)), dtype) for shape in shapes]


def check(function, *args):
    """The same with `fused` as without."""
    got, want = (jax.jit(function, static_argnums=0)(config, *args) for config in configs())
    assert_close(got, want, BOUND)


def configs():
    sizes = {**SIZES, "attention_scale": 0.5}
    return [models.Config(**sizes, fused=fused) for fused in (True, False)]


def total(config, mask, query, key, value):
    return jnp.sin(attend(query, key, value, mask, config=config)).sum()


MASKS = {"causal": None, "mask": jnp.tri(5, 7, 1, dtype=bool)}


@pytest.mark.usefixtures("in_place_of_the_kernel")
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(mask, marks=pytest.mark.slow if name == "mask" else (), id=name)
        for name, mask in MASKS.items()
    ],
)
def test_gradient_of_a_batch_and_through_one_and_two_vmaps(mask):
    args = operands(key=5 if mask is None else 7)
    slopes = jax.value_and_grad(total, (2, 3, 4))
    check(lambda config, *x: slopes(config, mask, *x), *(x[0] for x in args))
    over_rows = jax.vmap(total, (None, None, 0, 0, 0))

    def of_all(*x):
        return over_rows(*x).sum()

    check(lambda config, *x: jax.value_and_grad(of_all, (2, 3, 4))(config, mask, *x), *args)
    each = jax.vmap(slopes, (None, None, 0, 0, 0))
    check(lambda config, *x: each(config, mask, *x), *args)
    twice = [jnp.stack([x, x[::-1]]) for x in args]
    check(lambda config, *x: jax.vmap(lambda *x: each(config, mask, *x))(*twice), *twice)


@pytest.mark.usefixtures("in_place_of_the_kernel")
@pytest.mark.parametrize(
    ("prompt", "completions"),
    [
        pytest.param(4, (3, 3), id="one run"),
        pytest.param(3, (5, 5, 2), marks=pytest.mark.slow, id="two runs"),
        pytest.param(9, (2, 2), marks=pytest.mark.slow, id="long prompt"),
        pytest.param(9, (), id="no completion"),
    ],
)
def test_rows_as_sequences(prompt, completions, monkeypatch):
    """Each completion behind a copy of the prompt's real tokens; in parts, if that is faster."""
    seen = []
    monkeypatch.setattr(
        sequences, "_places", lambda *x, of=sequences._places: seen.append(1) or of(*x)
    )
    width = prompt + sum(completions)
    rng = np.random.default_rng(0)
    row = [jnp.asarray(rng.normal(size=(2, width, heads, 8))) for heads in (4, 2, 2)]
    lengths = jnp.array([prompt - 2, prompt])

    def of_row(config, length, *row):
        layout = Layout(length, prompt, completions)
        output = attend_by_layout(layout, *row, masks(layout, None), config=config, rng=None)
        return jnp.where((layout.segments >= 0)[:, None, None], jnp.sin(output), 0).sum()

    slopes = jax.vmap(jax.value_and_grad(of_row, (2, 3, 4)), (None, 0, 0, 0, 0))
    check(lambda config, *x: slopes(config, lengths, *x), *row)
    assert bool(seen) == (prompt < 9)

    def forward(config, *x):
        return jax.vmap(lambda *x: jax.jvp(partial(of_row, config, x[0]), x[1:], x[1:])[1])(
            lengths, *x
        )

    check(forward, *row)


@pytest.mark.usefixtures("in_place_of_the_kernel")
def test_keys_that_rows_share():
    query, key, value = operands()
    shared = jax.vmap(jax.grad(total, (2, 3, 4)), (None, None, 0, None, None))
    check(lambda config, *x: shared(config, MASKS["mask"], *x), query, key[0], value[0])


@pytest.mark.usefixtures("in_place_of_the_kernel")
def test_dropout_of_the_weights_goes_the_other_way():
    config = models.Config(**SIZES, attention_dropout=0.5)
    row = [x[0] for x in operands()]
    fused, dropped = (
        attend(*row, MASKS["mask"], config=config, rng=rng) for rng in (None, jax.random.key(0))
    )
    assert jnp.abs(fused - dropped).max() > 0.1


@pytest.mark.usefixtures("in_place_of_the_kernel")
def test_a_mask_for_each_row():
    masks = jnp.stack([MASKS["mask"], MASKS["mask"].at[2:, 1].set(False), MASKS["mask"]])
    each = jax.vmap(jax.grad(total, (2, 3, 4)), (None, 0, 0, 0, 0))
    check(lambda config, *x: each(config, masks, *x), *operands())


@pytest.mark.slow
@pytest.mark.usefixtures("in_place_of_the_kernel")
@pytest.mark.parametrize("settings", [{}, {"windows": (4, None), "remat": True}])
def test_gradient_of_the_loss(settings):
    batch = random_batch(pairs=4)

    def gradient(fused):
        policy = policy_of(**settings, fused=fused)
        reference = jax.tree.map(lambda x: 1.1 * x if eqx.is_inexact_array(x) else x, policy)
        return eqx.filter_jit(dpx.make_grad(losses.dpo))(policy, batch, reference)

    (got, metrics), (want, expected) = gradient(True), gradient(False)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(want), BOUND)
    assert_close(metrics, expected, BOUND)


def lowered(policy, batch, **options):
    """The program of a step for a GPU, with the policy as its own reference."""
    grad = dpx.make_grad(losses.dpo, **options)
    arrays, static = eqx.partition((policy, batch, policy), eqx.is_array_like)

    def of_arrays(arrays):
        return eqx.filter(grad(*eqx.combine(arrays, static)), eqx.is_array)

    return jax.jit(of_arrays).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()


def calls(policy, prompt=6):
    """How often each of cuDNN's kernels is in a step in half precision."""
    batch = random_batch(pairs=4, prompt=prompt, completion=8)
    names = re.findall(r"@__cudnn\$(\w+)", lowered(policy, batch, compute_dtype=jnp.bfloat16))
    return {name: names.count(name) for name in set(names)}


@pytest.mark.slow
def test_a_step_on_a_gpu_calls_the_kernel():
    # Policy, reference, and once more in the backward pass, whose kernel needs the forward kernel's
    # residuals. Each completion is a causal sequence with its prompt, which needs no mask.
    causal, masked = "fmhaSoftmax", "fmhaScaleBiasSoftmax"
    assert calls(policy_of()) == {causal: 3, f"{causal}Backward": 1}
    # Behind a long prompt, completions are a part of their own, with a mask.
    once = {f"{causal}Backward": 1, f"{masked}Backward": 1}
    assert calls(policy_of(), prompt=40) == {causal: 3, masked: 3, **once}
    # With a window, prompts need a mask, too.
    assert set(calls(policy_of(windows=(4, 4)))) == {masked, f"{masked}Backward"}


@pytest.mark.slow
def test_a_step_on_gpus_calls_the_kernel_for_the_rows_and_heads_of_each():
    devices = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    policy = sharding.shard_policy(policy_of(head_width=8), devices)
    batch = sharding.shard_batch(random_batch(pairs=8, prompt=6, completion=8), devices)
    text = lowered(policy, batch, compute_dtype=jnp.bfloat16)
    queries = re.findall(r"@__cudnn\$fmha\w+\(.*: \(tensor<([\dx]+)xbf16>", text)
    # Of 8 pairs and 4 heads: the completions of 2 pairs behind their prompts, and 2 heads.
    assert set(queries) == {"4x14x2x8"}
