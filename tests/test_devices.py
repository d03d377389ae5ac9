"""One step on eight virtual devices: the same parameters and metrics by every road, with SGD.

With SGD, because Adam hides a gradient that is eight times too large.
"""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx.losses import couples_pairs, dpo

from .policies import Perceptron, Recurrent, arrays, assert_close, random_batch, statics

MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
ROWS = P("data")
SGD = optax.sgd(0.5)
TOLERANCE = 1e-9


@couples_pairs
def centred(policy, reference):
    """A user's own loss that couples pairs: DPO's margin against the weighted mean margin."""
    losses = dpo(policy, reference)
    margin = losses.chosen_reward - losses.rejected_reward
    weight = jnp.ones_like(margin) if policy.weight is None else policy.weight
    mean = (weight * margin).sum() / weight.sum()
    return dataclasses.replace(losses, loss=-jax.nn.log_sigmoid(margin - 0.3 * mean))


LOSSES = {"separable": dpo, "coupled": centred}
POLICY, REFERENCE = Perceptron(jax.random.key(0)), Perceptron(jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    """Two pairs a device, of unequal weight; two devices have no weight at all."""
    weight = np.random.default_rng(0).uniform(0.5, 2, 16)
    weight[[2, 3, 8, 9, 12]] = 0
    return random_batch(pairs=16, weight=weight)


@pytest.fixture(scope="module", params=LOSSES)
def alone(request, batch):
    """The loss, and what one device makes of the batch."""
    loss = LOSSES[request.param]
    step = eqx.filter_jit(dpx.make_step(loss, SGD))
    policy, _, metrics = step(POLICY, SGD.init(arrays(POLICY)), batch, REFERENCE)
    return loss, (arrays(policy), metrics)


def mapped_step(loss, policy=POLICY, reference=REFERENCE, **options):
    """A step as raw transformations carry it: arrays only, functions kept outside."""
    step = dpx.make_step(loss, SGD, axis_name="data", **options)

    def on_device(params, batch, reference_params):
        policy_here = eqx.combine(params, statics(policy))
        reference_here = eqx.combine(reference_params, statics(reference))
        opt_state = SGD.init(params)
        policy_here, _, metrics = step(policy_here, opt_state, batch, reference_here)
        return arrays(policy_here), metrics

    return on_device


def on_mesh(function, mesh=MESH, rows=ROWS):
    """`function(params, batch)` with the rows of the batch over the mesh, jitted."""
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(P(), rows), out_specs=P()))


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(alone, batch, check_vma, microbatches):
    loss, want = alone
    step = jax.shard_map(
        mapped_step(loss, microbatches=microbatches),
        mesh=MESH,
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert_close(jax.jit(step)(arrays(POLICY), batch, arrays(REFERENCE)), want, TOLERANCE)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_pmap(alone, batch, microbatches):
    loss, want = alone
    step = jax.pmap(
        mapped_step(loss, microbatches=microbatches), axis_name="data", in_axes=(None, 0, None)
    )
    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    got = step(arrays(POLICY), split, arrays(REFERENCE))
    for device in (0, 7):
        assert_close(jax.tree.map(lambda x, d=device: x[d], got), want, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [dpo, centred], ids=list(LOSSES))
def test_filter_pmap(batch, loss):
    """Equinox finds shapes under a `vmap` of the same name first; with dropout and microbatches."""
    policy, key = Perceptron(jax.random.key(0), rate=0.5), jax.random.key(3)
    want = (
        eqx.filter_jit(dpx.make_grad(loss))(policy, batch, REFERENCE, key=key),
        eqx.filter_jit(dpx.make_eval(loss))(policy, batch, REFERENCE),
    )
    grad = dpx.make_grad(loss, axis_name="data", microbatches=2)
    evaluate = dpx.make_eval(loss, axis_name="data")

    def on_device(policy, batch):
        return grad(policy, batch, REFERENCE, key=key), evaluate(policy, batch, REFERENCE)

    split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    mapped = eqx.filter_pmap(
        on_device, in_axes=(None, eqx.if_array(0)), out_axes=None, axis_name="data"
    )
    assert_close(mapped(policy, split), want, TOLERANCE)


def sharded(batch, mesh=MESH):
    return jax.device_put(batch, NamedSharding(mesh, P("data")))


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_automatic_partitioning(alone, batch, microbatches):
    loss, want = alone
    step = eqx.filter_jit(dpx.make_step(loss, SGD, microbatches=microbatches))
    policy, reference = eqx.filter_shard((POLICY, REFERENCE), NamedSharding(MESH, P()))
    policy, _, metrics = step(policy, SGD.init(arrays(policy)), sharded(batch), reference)
    assert_close((arrays(policy), metrics), want, TOLERANCE)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("microbatches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_microbatches_on_one_device(loss, batch, microbatches):
    def gradient(count):
        return eqx.filter_jit(dpx.make_grad(loss, microbatches=count))(POLICY, batch, REFERENCE)

    assert_close(gradient(microbatches), gradient(1), TOLERANCE)


def test_pairs_of_weight_zero_have_no_influence_on_a_coupled_loss(batch):
    kept = np.flatnonzero(batch.weight)
    grad = eqx.filter_jit(dpx.make_grad(centred))
    removed = jax.tree.map(lambda x: x[kept], batch)
    assert_close(grad(POLICY, batch, REFERENCE), grad(POLICY, removed, REFERENCE), 1e-12)


def test_automatic_partitioning_does_not_gather_the_batch():
    """Each microbatch must span all devices: no device computes the others' rows."""
    batch = sharded(random_batch(pairs=32, prompt=5, completion=6))
    policy = eqx.filter_shard(POLICY, NamedSharding(MESH, P()))
    step = eqx.filter_jit(dpx.make_grad(dpo, microbatches=4))
    text = step.lower(policy, batch, policy).compile().compiled.as_text()
    gathers = re.findall(r"(?:all-gather|all-to-all|collective-permute)[-\w]*\(", text)
    assert not gathers, gathers
    # Eight pairs a microbatch, one of them on each device, each with two rows of 11 tokens.
    assert re.search(r"f64\[(1,)?2,11,", text)
    assert not re.search(r"f64\[8,2,11,", text)


@pytest.mark.slow
def test_a_recurrent_policy_under_shard_map():
    """Its scan must trace where what varies is tracked."""
    policy = Recurrent(jax.random.key(0))
    batch = random_batch(pairs=8)
    want = eqx.filter_jit(dpx.make_grad(dpo))(policy, batch, policy)
    grad = dpx.make_grad(dpo, axis_name="data")
    got = on_mesh(lambda params, batch: grad(eqx.combine(params, statics(policy)), batch, policy))(
        arrays(policy), batch
    )
    assert_close(got, want, TOLERANCE)


@pytest.mark.slow
def test_dropout_masks_do_not_depend_on_the_devices(batch):
    policy = Perceptron(jax.random.key(0), rate=0.5)
    key = jax.random.key(3)
    want = eqx.filter_jit(dpx.make_grad(dpo))(policy, batch, REFERENCE, key=key)
    grad = dpx.make_grad(dpo, axis_name="data")

    def on_device(params, batch, key):
        return grad(eqx.combine(params, statics(policy)), batch, REFERENCE, key=key)

    def run(key, spec):
        mapped = jax.shard_map(on_device, mesh=MESH, in_specs=(P(), P("data"), spec), out_specs=P())
        return jax.jit(mapped)(arrays(policy), batch, key)

    assert_close(run(key, P()), want, TOLERANCE)
    keys = jax.random.split(key, 16)
    assert_close(run(keys, P()), want, TOLERANCE)
    assert_close(run(keys, P("data")), want, TOLERANCE)


def test_precomputed_reference_and_per_pair_arguments_are_split_too(batch):
    per_pair = {"beta": np.linspace(0.1, 0.9, 16)}
    batch = dataclasses.replace(batch, per_pair=per_pair)
    want = eqx.filter_jit(dpx.make_grad(dpo))(POLICY, batch, REFERENCE)
    reference = eqx.filter_jit(dpx.precompute_reference)(REFERENCE, batch, microbatches=2)
    batch = dataclasses.replace(batch, reference=reference)
    grad = dpx.make_grad(dpo, axis_name="data", microbatches=2)
    got = on_mesh(
        lambda params, batch: grad(eqx.combine(params, statics(POLICY)), batch),
    )(arrays(POLICY), batch)
    assert_close(got, want, TOLERANCE)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_evaluation_over_devices(loss, batch):
    want = eqx.filter_jit(dpx.make_eval(loss))(POLICY, batch, REFERENCE)
    evaluate = dpx.make_eval(loss, axis_name="data")
    got = on_mesh(
        lambda params, batch: evaluate(eqx.combine(params, statics(POLICY)), batch, REFERENCE),
    )(arrays(POLICY), batch)
    assert_close(got, want, TOLERANCE)


def test_an_axis_of_several_names(batch):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    want = eqx.filter_jit(dpx.make_grad(centred))(POLICY, batch, REFERENCE)
    grad = dpx.make_grad(centred, axis_name=("data", "fsdp"))
    got = on_mesh(
        lambda params, batch: grad(eqx.combine(params, statics(POLICY)), batch, REFERENCE),
        mesh=mesh,
        rows=P(("data", "fsdp")),
    )(arrays(POLICY), batch)
    assert_close(got, want, TOLERANCE)
