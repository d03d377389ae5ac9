"""A sweep by the user's own `vmap`, split over an axis of the mesh, beside the rows of a batch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses, sharding
from dpo_eqx._jax.partitioning import beside_sweeps, keep_rows, row_axes
from dpo_eqx.sharding._collectives import collectives

from ..policies import Attention, Perceptron, arrays, assert_close, random_batch, statics

BATCH = random_batch(pairs=8, prompt=3, completion=3)
POLICIES = {"fast": Attention(jax.random.key(0), width=4), "plain": Perceptron(jax.random.key(0))}


def sweep(policy, axis):
    """The gradients of four policies, and of two `beta` for each, on one batch."""
    shapes = statics(policy)

    def gradient(params, beta, batch):
        def loss(log_probs, reference):
            return losses.dpo(log_probs, reference, beta=beta)

        whole = eqx.combine(params, shapes)
        return dpx.make_grad(loss, microbatches=2)(whole, batch, policy)

    return jax.jit(jax.vmap(gradient, in_axes=(0, 0, None), spmd_axis_name=axis))


def operands(policy):
    scale = jnp.arange(1.0, 5)
    stacked = jax.tree.map(lambda x: jnp.multiply.outer(scale, x), arrays(policy))
    return stacked, scale / 10


@pytest.mark.parametrize("wrap", [lambda function: function, beside_sweeps])
def test_axes_of_a_sweep_are_left_to_it(wrap):
    """Whatever the sweep splits; inside a loop if the function around it has looked."""
    found = []

    def in_loop(x, shared):
        axes = row_axes(x, shared)
        found.append(axes)
        return jax.vmap(keep_rows, spmd_axis_name=axes)(x) * shared

    def function(x, shared):
        in_loop(x, shared)
        if wrap is beside_sweeps:
            jax.lax.map(lambda x: in_loop(x, shared), x[None])
        return x

    mesh = sharding.make_mesh("data=4,fsdp=2")
    x = jax.device_put(jnp.ones((4, 8, 2)), NamedSharding(mesh, P("data", "fsdp")))
    shared = jax.device_put(jnp.ones(4), NamedSharding(mesh, P("data")))
    for axes in (0, 0), (0, None), (None, 0):
        operands = [v if axis == 0 else v[0] for v, axis in zip((x, shared), axes, strict=True)]
        mapped = jax.vmap(wrap(function), in_axes=axes, spmd_axis_name="data")
        jax.jit(mapped).lower(*operands)
    jax.jit(wrap(function)).lower(x[0], shared[0])
    looks = 2 if wrap is beside_sweeps else 1
    assert found == [("fsdp",)] * 3 * looks + [("data", "fsdp")] * looks


@pytest.mark.slow
@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_a_sweep_over_an_axis_of_rows(kind, axis):
    policy = POLICIES[kind]
    params, betas = operands(policy)
    want = sweep(policy, None)(params, betas, BATCH)
    mesh = sharding.make_mesh("data=4,fsdp=2" if axis == "data" else "data=2,fsdp=4")
    other = "fsdp" if axis == "data" else "data"
    params, betas = jax.device_put((params, betas), NamedSharding(mesh, P(axis)))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P(other)))
    run = sweep(policy, axis)
    assert_close(run(params, betas, batch), want, 1e-9)
    # Each device has one policy of the four and its part of the pairs: nothing is gathered.
    moved = collectives(run.lower(params, betas, batch).compile().as_text())
    assert moved
    assert {each.kind for each in moved} == {"all-reduce"}
