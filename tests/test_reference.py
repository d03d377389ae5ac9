"""References: copies, precomputed ones, mixtures, and views."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx.losses import dpo

from .policies import Perceptron, arrays, assert_close, random_batch

POLICY, REFERENCE = Perceptron(jax.random.key(0)), Perceptron(jax.random.key(1))
BATCH = random_batch()


def pointers(tree):
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(arrays(tree))}


def test_a_snapshot_is_equal_and_shares_nothing():
    copy = dpx.snapshot(POLICY)
    assert eqx.tree_equal(copy, POLICY)
    assert not pointers(copy) & pointers(POLICY)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_precomputed_reference_is_the_live_one(microbatches):
    grad = eqx.filter_jit(dpx.make_grad(dpo))
    precompute = eqx.filter_jit(dpx.precompute_reference)
    stored = precompute(REFERENCE, BATCH, microbatches=microbatches)
    batch = dataclasses.replace(BATCH, reference=stored)
    assert_close(grad(POLICY, batch), grad(POLICY, BATCH, REFERENCE), 1e-12)
    on_host = jax.tree.map(np.asarray, batch)
    assert_close(grad(POLICY, on_host), grad(POLICY, batch), 1e-15)


def test_a_precomputed_reference_drops_nothing_out():
    dropping = Perceptron(jax.random.key(1), rate=0.5)
    want = dpx.score_pairs(eqx.nn.inference_mode(dropping), BATCH)
    assert_close(dpx.precompute_reference(dropping, BATCH), want, 1e-15)


def test_a_view_of_the_policy_is_its_reference():
    """The first layer trains; the view puts the old one in its place, the rest is shared."""
    first = POLICY.mlp.layers[0]
    trainable = eqx.tree_at(
        lambda p: p.mlp.layers[0].weight, jax.tree.map(lambda _: False, POLICY), replace=True
    )

    def before(policy):
        return eqx.tree_at(lambda p: p.mlp.layers[0], policy, first)

    moved = eqx.tree_at(lambda p: p.mlp.layers[0].weight, POLICY, 2 * first.weight)
    options = {"trainable": trainable}
    got = eqx.filter_jit(dpx.make_grad(dpo, reference_of=before, **options))(moved, BATCH)
    want = eqx.filter_jit(dpx.make_grad(dpo, **options))(moved, BATCH, POLICY)
    assert_close(got, want, 1e-12)
    evaluate = eqx.filter_jit(dpx.make_eval(dpo, reference_of=before))
    np.testing.assert_allclose(evaluate(moved, BATCH).mean()["loss"], want[1]["loss"], rtol=1e-12)


def test_no_gradient_reaches_the_reference():
    def loss(reference):
        return dpx.make_grad(dpo)(POLICY, BATCH, reference)[1]["loss"]

    for leaf in jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(loss))(REFERENCE)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("alpha", [0, 0.25, 1.0, jnp.asarray(0.5)])
def test_synchronising_mixes_and_shares_nothing(alpha):
    moved = eqx.filter_jit(dpx.sync_reference)(REFERENCE, POLICY, alpha)
    eager = dpx.sync_reference(REFERENCE, POLICY, alpha)
    want = jax.tree.map(
        lambda new, old: alpha * new + (1 - alpha) * old, arrays(POLICY), arrays(REFERENCE)
    )
    for got in (moved, eager):
        assert_close(got, want, 1e-15)
        assert not pointers(got) & (pointers(POLICY) | pointers(REFERENCE))
    assert eager.mlp.activation is REFERENCE.mlp.activation


def test_synchronising_keeps_the_references_dtype():
    narrow = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, REFERENCE
    )
    assert dpx.sync_reference(narrow, POLICY, 0.5).embedding.dtype == jnp.bfloat16


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_synchronising_refuses_what_is_no_mixture(alpha):
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got"):
        dpx.sync_reference(REFERENCE, POLICY, alpha)


def test_synchronising_refuses_another_structure():
    with pytest.raises(ValueError, match="must have one structure"):
        dpx.sync_reference(REFERENCE, POLICY.mlp, 0.5)


def test_training_with_a_moving_reference():
    """TR-DPO as a user writes it: the reference is a value like any other."""
    optimizer = optax.sgd(0.5)
    step = eqx.filter_jit(dpx.make_step(dpo, optimizer))
    policy, reference = POLICY, dpx.snapshot(POLICY)
    opt_state = optimizer.init(arrays(policy))
    for _ in range(3):
        policy, opt_state, _ = step(policy, opt_state, BATCH, reference)
        reference = dpx.sync_reference(reference, policy, 1.0)
    _, _, metrics = step(policy, opt_state, BATCH, reference)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-12)
