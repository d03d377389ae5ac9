"""References: copies, precomputed ones, mixtures, and views."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx._training.dependence import dependent_paths
from dpo_eqx.losses import dpo

from .policies import Perceptron, arrays, assert_close, random_batch, statics

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


def test_a_precomputed_reference_of_single_completions_is_their_score():
    label = np.arange(BATCH.pairs) % 2 == 0
    batch = dpx.UnpairedBatch(BATCH.prompt, BATCH.chosen, label, kl=BATCH.rejected)
    stored = dpx.precompute_reference(REFERENCE, batch, score=dpx.score_unpaired)
    assert_close(stored, dpx.score_unpaired(REFERENCE, batch), 1e-15)


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
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\]; got"):
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


TRAINED = {
    "itself": lambda p: p,
    "stopped": lambda p: jax.tree.map(
        lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, p
    ),
    "snapshot": dpx.snapshot,
    "multiplied": lambda p: jax.tree.map(lambda x: x * 1 if eqx.is_array(x) else x, p),
    "jitted": eqx.filter_jit(dpx.snapshot),
    "one array": lambda p: eqx.tree_at(lambda q: q.embedding, REFERENCE, p.embedding + 0),
    "scanned": lambda p: eqx.tree_at(
        lambda q: q.embedding,
        REFERENCE,
        jax.lax.scan(lambda c, x: (c + x, x), jnp.zeros(4), p.embedding)[1],
    ),
    "a closure": lambda p: lambda ids: p(ids),
    "a partial": lambda p: partial(Perceptron.__call__, p),
    "NumPy": lambda p: jax.tree.map(lambda x: np.asarray(x) if eqx.is_array(x) else x, p),
}


@pytest.mark.parametrize("view", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("how", ["eager", "jit", "vmap", "scan", "grad"])
def test_a_view_that_moves_with_the_policy(view, how):
    """Refused at trace time, by any operation and under any transformation."""
    grad = dpx.make_grad(dpo, reference_of=view)

    def loss(params):
        return grad(eqx.combine(params, statics(POLICY)), BATCH)[1]["loss"]

    run = {
        "eager": loss,
        "jit": jax.jit(loss),
        "vmap": lambda p: jax.vmap(loss)(jax.tree.map(lambda x: x[None], p)),
        "scan": lambda p: jax.lax.scan(lambda c, _: (c, loss(c)), p, length=2),
        "grad": jax.grad(loss),
    }[how]
    with pytest.raises(ValueError, match=r"`reference_of` (shows arrays|must be traceable)"):
        run(arrays(POLICY))


def frozen_first(policy):
    """A filter that trains the last layer alone."""
    return eqx.tree_at(
        lambda p: p.mlp.layers[1],
        jax.tree.map(lambda _: False, policy),
        jax.tree.map(lambda _: True, policy.mlp.layers[1]),
    )


UNTRAINED = {
    "zeros": lambda p: eqx.tree_at(
        lambda q: q.mlp.layers[1], p, jax.tree.map(jnp.zeros_like, p.mlp.layers[1])
    ),
    "a snapshot of the rest": lambda p: dpx.snapshot(
        eqx.tree_at(lambda q: q.mlp.layers[1], p, POLICY.mlp.layers[1])
    ),
    "under jit, beside it": lambda p: eqx.filter_jit(lambda p: (dpx.snapshot(REFERENCE), p))(p)[0],
    "scanned, beside it": lambda p: eqx.tree_at(
        lambda q: q.mlp.layers[1].bias,
        POLICY,
        jax.lax.scan(
            lambda c, x: ((c[0] + x[0], c[1] + 1), (x[0], c[1])),
            (jnp.zeros(()), jnp.zeros(())),
            (p.mlp.layers[1].bias, p.mlp.layers[1].bias),
        )[1][1],
    ),
    "NumPy of the rest": lambda p: eqx.tree_at(
        lambda q: (q.embedding, q.mlp.layers[1]),
        p,
        (jnp.asarray(np.asarray(p.embedding)), POLICY.mlp.layers[1]),
    ),
}


@pytest.mark.parametrize("view", UNTRAINED.values(), ids=UNTRAINED)
def test_a_view_that_does_not_depend_on_what_is_trained(view):
    """It may use shapes of trained arrays, and pass them through what has other results."""
    grad = dpx.make_grad(dpo, reference_of=view, trainable=frozen_first(POLICY))
    # The policy is closed over: what is frozen has values that a view may read on the host.
    eqx.filter_eval_shape(lambda batch: grad(POLICY, batch), BATCH)


def test_the_error_names_what_is_shown():
    grad = dpx.make_grad(dpo, reference_of=TRAINED["one array"])
    with pytest.raises(ValueError, match=r"move with the policy: embedding\. Freeze them by"):
        eqx.filter_eval_shape(grad, POLICY, BATCH)


def test_branches_and_loops_are_followed():
    def view(arrays):
        flag, x, y = arrays["flag"], arrays["x"], jnp.ones(2)
        return {
            "index": jax.lax.cond(flag, lambda: y, lambda: 2 * y),
            "operand": jax.lax.cond(True, lambda x: y, lambda x: x, x),
            "neither": jax.lax.cond(True, lambda x: y, lambda x: 2 * y, x),
            "carried": jax.lax.scan(lambda c, _: ((c[1], c[1] + c[0]), c[0]), (y, x), length=3)[1],
            "loop": jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x),
            "rule": jax.nn.relu(x),
            "callback": jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((2,), x.dtype), x),
            "shape": jnp.full(x.shape, 3.0),
            "remat": jax.checkpoint(lambda x: (y, x))(x)[0],
        }

    paths = dependent_paths(view, {"flag": jnp.asarray(True), "x": jnp.zeros(2)})
    assert paths == ["callback", "carried", "index", "loop", "operand", "rule"]
