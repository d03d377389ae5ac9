"""A small step compiled for GPUs and TPUs that need not be here, where the plugins are installed.

It checks that the program of the compiler calls the kernel of attention. `test_plan.py` has what
needs no plugin, and `tests/models/test_kernels.py` which kernel is chosen when a step is lowered.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

PLUGINS = {"h100": "jax_cuda13_plugin", "v5e": "libtpu", "v6e": "libtpu"}
# A process of its own: a plugin starts once in a process, with the settings of all tests.
PLAN = """
import dataclasses, json, sys
import equinox as eqx, jax, jax.numpy as jnp, numpy as np, optax
import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding

target, mesh = sys.argv[1:]
config = models.Config(
    vocab=256, width=64, layers=2, heads=4, key_heads=2, head_width=64, remat=True
)
policy = eqx.filter_eval_shape(models.Transformer, config, key=jax.random.key(0))
optimizer = optax.sgd(0.1)
opt_state = eqx.filter_eval_shape(optimizer.init, policy)


def tokens(length):
    return dpx.Tokens(np.zeros((8, length), np.int32), np.ones((8, length), bool))


batch = dpx.PreferenceBatch(tokens(128), tokens(128), tokens(128))
step = dpx.make_step(losses.dpo, optimizer, compute_dtype=jnp.bfloat16)
plan = sharding.plan(step, policy, opt_state, batch, policy, target=target, mesh=mesh)
print(json.dumps(plan.as_dict()))
"""
ALONE = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compiled(target, mesh):
    """The numbers of the step on this target."""
    plugin = PLUGINS[target.partition(":")[0]]
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin}, the compiler for {target}, is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", PLAN, target, mesh],
        env=environment | ALONE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "mesh", "kernel"),
    [
        ("h100", "data=1", "cudnn"),
        ("h100:8", "data=2,fsdp=2,tensor=2", "cudnn"),
        ("v5e:1", "data=1", "splash"),
        ("v5e:2x2", "fsdp=2,tensor=2", "splash"),
        ("v6e:2x2", "data=2,fsdp=2", "splash"),
    ],
)
def test_the_program_calls_the_kernel_of_attention(target, mesh, kernel):
    plan = compiled(target, mesh)
    assert plan["attention"] == kernel
    assert plan["temporaries"] > 0
    assert plan["fits"]
    # A device sends at least each gradient once, of 4 bytes, to some others.
    assert (plan["collective_bytes"] > plan["arguments"] / 10) == (mesh != "data=1")
