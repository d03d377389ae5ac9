"""Settings of every test: eight virtual CPU devices, float64, shapes checked, nothing promoted."""

import functools
import gc
import itertools
import os
from importlib.metadata import version
from pathlib import Path

# Before JAX is imported anywhere. Without several devices chex would skip its pmap variants; and
# most of the time goes to compiling programs that run for microseconds. Unoptimised, and by XLA's
# older code for fusions, that takes a quarter of the time. JAX 0.12 has the newer code only.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false" if version("jax") < "0.12" else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import chex
import jax
import jaxtyping
import pytest
from jax._src.interpreters import mlir

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
chex.set_n_cpu_devices(8)

# JAX gives each program that it lowers a new MLIR context, which stays alive with the program: half
# of the memory of a process that compiles thousands of them. Contexts are made to be shared.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)

jaxtyping.install_import_hook("dpo_eqx", "beartype.beartype")


@pytest.fixture
def unchecked():
    """Shape checking switched off, as for most users: the library's own checks must speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def standard_promotion():
    """For what mixes dtypes inside somebody else's code, such as Optax's Adam."""
    with jax.numpy_dtype_promotion("standard"):
        yield


TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def bounded_programs():
    """Compiled programs are dropped if a process holds many; every twentieth test looks.

    Each program holds memory maps, of which Linux allows a process 65,530. XLA crashes beyond that.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
