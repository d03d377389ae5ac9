"""Attention through cuDNN's kernel, as far as can be seen without a GPU.

What is ours, the gradient and the merging of batches, runs here on JAX's own attention in the
kernel's place; and whole steps are lowered for a GPU, to see where the kernel is called.
"""

import re
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses, models
from dpo_eqx.models._decoder import attention, fused
from dpo_eqx.models._decoder.attention import attend

from ..policies import assert_close, random_batch

SIZES = {"vocab": 96, "width": 32, "layers": 2, "heads": 4, "key_heads": 2}
BOUND = 1e-6  # JAX's attention has a softmax in float32.


@pytest.fixture
def on_gpu(monkeypatch):
    """The kernel is taken where it would be on a GPU, and is there as far as tracing goes."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "has_kernel", lambda: True)


@pytest.fixture
def in_place_of_the_kernel(monkeypatch, standard_promotion):
    monkeypatch.setattr(attention, "fits", lambda *_: True)
    monkeypatch.setattr(fused, "KERNEL", "xla")


def policy_of(**settings):
    policy = models.Transformer(models.Config(**{**SIZES, **settings}), key=jax.random.key(0))
    return jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, policy)


def operands(query=6, key=8, dtype=jnp.float64):
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


MASKS = {"causal": None, "mask": jnp.tri(6, 8, 1, dtype=bool)}


@pytest.mark.usefixtures("in_place_of_the_kernel")
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(mask, marks=pytest.mark.slow if name == "mask" else (), id=name)
        for name, mask in MASKS.items()
    ],
)
def test_gradient_of_a_batch_and_through_one_and_two_vmaps(mask):
    args = operands(key=6 if mask is None else 8)
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


def calls(policy, *, compute_dtype=jnp.bfloat16, prompt=6, completion=8, **options):
    """How often each of cuDNN's kernels is in a step lowered for a GPU."""
    batch = random_batch(pairs=4, prompt=prompt, completion=completion)
    grad = dpx.make_grad(losses.dpo, compute_dtype=compute_dtype, **options)
    arrays, static = eqx.partition((policy, batch, policy), eqx.is_array_like)

    def of_arrays(arrays):
        return eqx.filter(grad(*eqx.combine(arrays, static)), eqx.is_array)

    lowered = jax.jit(of_arrays).trace(arrays).lower(lowering_platforms=("cuda",))
    names = re.findall(r"@__cudnn\$(\w+)", lowered.as_text())
    return {name: names.count(name) for name in set(names)}


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
def test_a_step_on_a_gpu_calls_the_kernel():
    # A prompt is causal and needs no mask, a completion needs one. Policy, reference, and once more
    # in the backward pass, whose kernel needs the forward kernel's residuals.
    found = calls(policy_of())
    causal, masked = "fmhaSoftmax", "fmhaScaleBiasSoftmax"
    once = {f"{causal}Backward": 1, f"{masked}Backward": 1}
    assert found == {causal: 3, masked: 3, **once}
    # With a window both need one.
    assert set(calls(policy_of(windows=(4, 4)))) == {masked, f"{masked}Backward"}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"fused": False}, {}),
        ({"attention_softcap": 20.0}, {}),
        ({"head_width": 12}, {}),
        pytest.param({"head_width": 136}, {}, marks=pytest.mark.slow),
        ({}, {"compute_dtype": jnp.float32}),
        ({}, {"prompt": 7, "completion": 8}),
    ],
)
def test_what_does_not_fit_goes_the_other_way(settings, options):
    assert calls(policy_of(**settings), **options) == {}


@pytest.mark.usefixtures("on_gpu")
def test_partitioned_rows_go_the_other_way():
    query, key, _ = (x[0] for x in operands(dtype=jnp.bfloat16))
    assert fused.fits(query, key, None)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(query, NamedSharding(mesh, P("data")))
    seen = []
    jax.jit(lambda query, key: seen.append(fused.fits(query, key, None)))(split, key)
    assert seen == [False]


@pytest.mark.parametrize(
    ("backend", "version", "capability", "expected"),
    [
        ("cpu", "<unknown>", None, False),
        ("gpu", "rocm 60000", "9.4", False),
        ("gpu", "cuda 12090", "7.5", False),
        ("gpu", "cuda 12090", "8.0", True),
        ("gpu", "cuda 12090", "10.3", True),
    ],
)
def test_which_devices_have_the_kernel(monkeypatch, backend, version, capability, expected):
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert fused.has_kernel() == expected
