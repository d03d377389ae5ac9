"""The kernels of attention: which platform gets which, for which arrays, and what a mesh does.

The kernels are lowered here and do not run: `test_fused.py` and `test_splash.py` check the numbers.
"""

import contextlib
import re
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from dpo_eqx import models, sharding
from dpo_eqx._jax import gpus, platform_rules
from dpo_eqx.models._decoder import kernels
from dpo_eqx.models._decoder.attention import attend
from dpo_eqx.models._decoder.how import How

CAUSAL = {"fmhaSoftmax", "fmhaSoftmaxBackward"}
MASKED = {"fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward"}
SPLASH = {
    "splash_mha_fwd_no_residuals",
    "splash_mha_fwd_residuals",
    "splash_mha_dq_no_residuals",
    "splash_mha_dkv_no_residuals",
}
SEGMENTED = {name.replace("_no_", "_segmented_no_") for name in SPLASH if "_no_" in name}
SEGMENTED |= {"splash_mha_fwd_segmented_residuals"}
HOPPER, BLACKWELL, TURING = (gpus.Capability(*x) for x in ((9, 0), (10, 0), (7, 5)))


def found(text):
    """The kernels that a lowered program calls."""
    names = re.findall(r'@__cudnn\$(\w+)|kernel_name = "(\w+)"', text)
    return {cudnn or splash for cudnn, splash in names}


def lower(function, platform, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def gradient(form="any", **settings):
    """The gradient of attention, and the shapes of its arguments."""
    sizes = {"queries": 8, "keys": 8, "dtype": jnp.bfloat16, "heads": 4, "key_heads": 2}
    sizes |= {"head_width": 16, "masked": False} | settings
    queries, keys, dtype, masked = (
        sizes.pop(name) for name in ("queries", "keys", "dtype", "masked")
    )
    config = models.Config(vocab=1, width=1, layers=1, **sizes)

    def total(operands, mask):
        return jnp.sin(attend(*operands, mask, config=config, form=form).astype(jnp.float32)).sum()

    widths = (queries, config.heads), (keys, config.key_heads), (keys, config.key_heads)
    operands = [jax.ShapeDtypeStruct((2, *x, config.head_width), dtype) for x in widths]
    mask = jax.ShapeDtypeStruct((queries, keys), bool) if masked else None
    return jax.grad(total), operands, mask


def test_one_traced_program_has_the_kernels_of_each_platform():
    function, *shapes = gradient()
    program = jax.jit(function).trace(*shapes)

    def kernels_on(platform):
        return found(program.lower(lowering_platforms=(platform,)).as_text())

    got = {platform: kernels_on(platform) for platform in ("cpu", "cuda", "rocm", "tpu")}
    assert got == {"cpu": set(), "cuda": CAUSAL, "rocm": set(), "tpu": SPLASH}


def test_a_program_exported_for_several_platforms_runs_on_this_one():
    function, operands, _ = gradient()
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in operands]
    # JAX does not promise that a later release of cuDNN has the same calls.
    names = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    program = jax.jit(function)
    exported = jax.export.export(
        program, platforms=("cpu", "cuda", "tpu"), disabled_checks=unchecked
    )(operands, None)
    assert found(str(exported.mlir_module())) == CAUSAL | SPLASH
    for got, want in zip(exported.call(operands, None), program(operands, None), strict=True):
        np.testing.assert_array_equal(got, want)


MASK = {"queries": 6, "masked": True}


@pytest.mark.parametrize(
    ("platform", "settings", "expected"),
    [
        ("cuda", MASK | {"form": "keys"}, MASKED),
        ("cuda", {"fused": False}, set()),
        ("tpu", MASK | {"form": "keys"}, SEGMENTED),
        ("tpu", MASK, set()),
    ],
)
def test_masks(platform, settings, expected):
    function, *shapes = gradient(**settings)
    assert found(lower(function, platform, *shapes)) == expected


BOTH, CUDA, TPU, NEITHER = {"cuda", "tpu"}, {"cuda"}, {"tpu"}, set()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, BOTH),
        ({"form": "keys"}, BOTH),
        ({"form": "any"}, CUDA),
        ({"softcap": 20.0}, TPU),
        ({"head_width": 12}, NEITHER),
        ({"dtype": jnp.float16}, CUDA),
        ({"dtype": jnp.float32}, TPU),
        ({"dtype": jnp.float64}, NEITHER),
        ({"head_width": 136}, TPU),
        ({"head_width": 256, "capability": HOPPER}, BOTH),
        ({"head_width": 264, "capability": HOPPER}, TPU),
        ({"head_width": 128, "capability": BLACKWELL}, BOTH),
        ({"head_width": 256, "capability": BLACKWELL}, TPU),
        ({"capability": TURING}, TPU),
    ],
)
def test_which_arrays_a_kernel_takes(settings, expected):
    given = {"form": "causal", "softcap": None, "head_width": 64, "dtype": jnp.bfloat16}
    given |= {"capability": None} | settings
    how = How(1.0, given["softcap"], given["form"], use_kernels=True)
    query = jax.ShapeDtypeStruct((2, 8, 2, 2, given["head_width"]), given["dtype"])
    with gpus.assume(given["capability"]):
        takes = {name: kernel.fits(how, query) for name, kernel in kernels.KERNELS.items()}
        assert {name for name in takes if takes[name]} == expected


def test_the_gpus_of_this_process_are_asked(monkeypatch):
    device = SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    assert gpus.capability() == HOPPER
    with gpus.assume(TURING):
        assert gpus.capability() == TURING
    monkeypatch.undo()
    assert gpus.capability() == gpus.AMPERE


def test_odd_lengths_are_padded():
    for settings in ({"queries": 7, "keys": 7}, {"queries": 5, "keys": 7, "masked": True}):
        function, *shapes = gradient(**settings)
        text = lower(function, "cuda", *shapes)
        calls = [line for line in text.splitlines() if "custom_call @__cudnn" in line]
        assert found(text) == (MASKED if "masked" in settings else CAUSAL)
        sizes = {n for line in calls for n in re.findall(r"tensor<2x(\d+)x\dx16xbf16>", line)}
        assert "8" in sizes
        assert not sizes & {"5", "7"}


def plain(how, query, key, value, *mask):
    """What a kernel computes, in float64."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    scores = how.scale * jnp.einsum("bthd,bshd->bhts", query, key)
    seen = mask[0] if mask else jnp.tri(*scores.shape[-2:], dtype=bool)[None]
    scores = jnp.where(jnp.broadcast_to(seen[:, None], scores.shape), scores, -1e30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), value)


@pytest.fixture
def shapes_of_kernel(monkeypatch):
    """`plain` is the kernel of the CPU; the shapes of the queries that it gets."""
    seen = set()

    def attention(how, query, *operands):
        seen.add(query.shape)
        return plain(how, query, *operands)

    module = ModuleType("plain")
    own = {"fits": lambda *_: True, "attention": attention, "tracing": contextlib.nullcontext}
    vars(module).update(own)
    monkeypatch.setitem(kernels.KERNELS, "cpu", module)
    platform_rules._run_now.clear_cache()
    yield seen
    platform_rules._run_now.clear_cache()


ROWS = 8


def rows(masked):
    """The value and the gradients of many rows of attention, in float64, and its arguments."""
    function, operands, mask = gradient(
        dtype=jnp.float64, heads=8, head_width=4, queries=6, keys=8 if masked else 6, masked=masked
    )
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=(ROWS, *x.shape))) for x in operands]
    seen = jnp.asarray(rng.random((ROWS, *mask.shape)) < 0.7).at[..., 0].set(True) if mask else None
    return function, (operands, seen)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("mesh", "shape"),
    [
        ("data=2,fsdp=2,tensor=2", (4, 6, 4, 4)),
        ("data=2,tensor=4", (8, 6, 2, 4)),  # Each of two keys goes to two devices.
        ("tensor=8", (16, 6, 1, 4)),
    ],
)
def test_a_mesh_splits_rows_and_heads(shapes_of_kernel, mesh, shape, masked):
    function, arguments = rows(masked)
    kernel = kernels.KERNELS.pop("cpu")
    want = jax.jit(jax.vmap(function))(*arguments)
    kernels.KERNELS["cpu"] = kernel
    devices = sharding.make_mesh(mesh)
    names = tuple(name for name in ("data", "fsdp") if name in devices.axis_names)
    split = jax.device_put(arguments, NamedSharding(devices, P(names)))
    over_rows = jax.vmap(lambda *x: function(*x), spmd_axis_name=names or None)
    got = jax.jit(over_rows)(*split)
    # JAX also traces the kernel for a row by itself.
    assert max(shapes_of_kernel) == shape
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)


def test_forward_mode_runs_in_blocks(shapes_of_kernel):
    """A kernel has neither forward mode nor the normaliser of the blocks."""
    config = models.Config(vocab=1, width=1, layers=1, heads=2, head_width=4)
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=(1, 5, 2, 4))) for _ in range(3)]
    how = How(0.5, None, "causal", use_kernels=True)

    def slope(attention):
        return jax.jit(lambda *x: jax.jvp(attention, x, x[::-1]))(*operands)

    ours = slope(lambda *x: attend(*x, None, config=config))
    for got, want in zip(ours, slope(lambda *x: plain(how, *x)), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)
    assert shapes_of_kernel == {(1, 5, 2, 4)}


def on_mesh(sizes, *, rows="data", axes=None, **settings):
    """The kernels of a program for GPUs, of rows over an axis, in a `vmap` or a `shard_map`."""
    function, operands, _ = gradient(**settings)
    devices = sharding.make_mesh(sizes)
    where = NamedSharding(devices, P(rows))
    split = [jax.ShapeDtypeStruct((8, *x.shape), x.dtype, sharding=where) for x in operands]

    def over_rows(operands):
        return jax.vmap(lambda *row: function(row, None))(*operands)

    if axes is not None:
        over_rows = jax.shard_map(
            over_rows, mesh=devices, in_specs=P(rows), out_specs=P(rows), axis_names=axes
        )
    return found(lower(over_rows, "cuda", split))


@pytest.mark.parametrize(
    ("sizes", "settings", "expected"),
    [
        ("data=8", {}, set()),  # Nothing says that the `vmap` splits.
        ("data=4,tensor=2", {"axes": {"data", "fsdp", "tensor"}}, CAUSAL),
        ("data=4,tensor=2", {"axes": {"data"}}, set()),
        ("tensor=8", {"rows": None, "heads": 8}, CAUSAL),
        ("tensor=8", {"rows": None, "heads": 4}, set()),  # They do not split over 8 devices.
    ],
)
def test_which_meshes_have_a_kernel(sizes, settings, expected):
    assert on_mesh(sizes, **settings) == expected
