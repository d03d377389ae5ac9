"""Gradients and steps on one device: exact whatever the way the batch is laid out or run."""

import dataclasses
from functools import partial

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx.losses import dpo

from . import brute_force
from .policies import (
    VOCAB,
    Attention,
    Perceptron,
    Recurrent,
    arrays,
    assert_close,
    random_batch,
    statics,
)

POLICY, REFERENCE = Perceptron(jax.random.key(0)), Perceptron(jax.random.key(1))
SGD = optax.sgd(0.5)
score = eqx.filter_jit(dpx.score_pairs)


def one_step(batch, policy=POLICY, reference=REFERENCE, loss=dpo, key=None, **options):
    """The policy after one jitted step of SGD, and the metrics."""
    step = eqx.filter_jit(dpx.make_step(loss, SGD, **options))
    opt_state = SGD.init(eqx.filter(policy, options.get("trainable", eqx.is_inexact_array)))
    policy, _, metrics = step(policy, opt_state, batch, reference, key=key)
    return policy, metrics


@pytest.fixture(scope="module")
def batch():
    return random_batch()


@pytest.fixture(scope="module")
def stepped(batch):
    return one_step(batch)


def test_loss_and_gradient_of_a_recurrent_policy_equal_brute_force():
    batch = random_batch(pairs=4, prompt=3, completion=3)
    policy, reference = Recurrent(jax.random.key(0)), Recurrent(jax.random.key(1))
    loss = partial(dpo, beta=0.3)
    gradients, metrics = eqx.filter_jit(dpx.make_grad(loss))(policy, batch, reference)
    want = eqx.filter_jit(
        eqx.filter_value_and_grad(
            lambda policy: brute_force.dpo_loss(policy, reference, batch, beta=0.3)
        )
    )(policy)
    assert_close((metrics["loss"], gradients), want, 1e-10)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(want[1])))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-10)


def test_metrics_are_weighted_means(batch, stepped):
    _, metrics = stepped
    ours, theirs = (score(p, batch) for p in (POLICY, REFERENCE))
    chosen, rejected = 0.1 * (ours.chosen - theirs.chosen), 0.1 * (ours.rejected - theirs.rejected)
    want = {
        "loss": jnp.log1p(jnp.exp(rejected - chosen)),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(float),
        "logps/chosen": ours.chosen,
        "logps/rejected": ours.rejected,
    }
    assert metrics.keys() == {*want, "grad_norm"}
    for name, values in want.items():
        mean = (batch.weight * values).sum() / batch.weight.sum()
        np.testing.assert_allclose(metrics[name], mean, rtol=1e-12, err_msg=name)


def test_a_tie_counts_one_half(batch):
    _, metrics = one_step(batch, reference=POLICY)
    assert metrics["rewards/accuracies"] == 0.5


@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_microbatches_change_nothing(batch, stepped, microbatches):
    assert_close(one_step(batch, microbatches=microbatches), stepped, 1e-9)


def test_a_weight_of_zero_removes_a_pair(batch):
    kept = np.array([0, 1, 2, 4, 5, 6])
    weight = np.where(np.isin(np.arange(8), kept), batch.weight, 0)
    silenced = dataclasses.replace(batch, weight=weight)
    removed = jax.tree.map(lambda x: x[kept], batch)
    want = one_step(removed)
    assert_close(one_step(silenced), want, 1e-12)
    # Not even a scored id outside the vocabulary, whose log-probability is NaN, has influence.
    ids = batch.chosen.ids.copy()
    ids[3, 0] = 1000
    spoiled = dataclasses.replace(silenced, chosen=dpx.Tokens(ids, batch.chosen.mask))
    assert_close(one_step(spoiled), want, 1e-12)


def test_weights_that_sum_to_zero_give_zeros(batch):
    batch = dataclasses.replace(batch, weight=np.zeros(8))
    gradients, metrics = eqx.filter_jit(dpx.make_grad(dpo))(POLICY, batch, REFERENCE)
    for value in [*jax.tree.leaves(gradients), *metrics.values()]:
        np.testing.assert_array_equal(value, 0)


def test_an_empty_completion_and_a_masked_row_of_minus_infinity_are_finite(batch):
    mask = batch.rejected.mask.copy()
    mask[2] = False
    batch = dataclasses.replace(batch, rejected=dpx.Tokens(batch.rejected.ids, mask))

    def banned(ids):
        """All logits -inf behind the padding's id 0."""
        return jnp.where((ids == 0)[:, None], -jnp.inf, POLICY(ids))

    scored = score(banned, batch)
    assert scored.rejected[2] == 0
    assert scored.rejected_length[2] == 0
    policy, metrics = one_step(batch)
    chex.assert_tree_all_finite((arrays(policy), metrics))


def test_eager_jitted_and_scanned_agree(batch, stepped):
    step = dpx.make_step(dpo, SGD)
    opt_state = SGD.init(arrays(POLICY))
    policy, _, metrics = step(POLICY, opt_state, batch, REFERENCE)
    assert_close((policy, metrics), stepped, 1e-12)

    def advance(carry, batch):
        params, opt_state = carry
        policy, opt_state, metrics = step(
            eqx.combine(params, statics(POLICY)), opt_state, batch, REFERENCE
        )
        return (arrays(policy), opt_state), metrics

    batches = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    (params, _), scanned = jax.lax.scan(advance, (arrays(POLICY), opt_state), batches)
    assert_close(jax.tree.map(lambda x: x[0], scanned), stepped[1], 1e-12)
    twice = one_step(batch, policy=stepped[0])
    assert_close(params, arrays(twice[0]), 1e-12)


def test_vmap_over_seeds_and_over_beta(batch):
    keys = jax.random.split(jax.random.key(5), 3)
    policies = eqx.filter_vmap(Perceptron)(keys)
    betas = jnp.array([0.1, 0.5, 2.0])

    @eqx.filter_vmap(in_axes=(eqx.if_array(0), 0))
    def together(policy, beta):
        grad = dpx.make_grad(partial(dpo, beta=beta), microbatches=2)
        return grad(policy, batch, REFERENCE)

    got = eqx.filter_jit(together)(policies, betas)
    for i, (key, beta) in enumerate(zip(keys, betas, strict=True)):
        grad = eqx.filter_jit(dpx.make_grad(partial(dpo, beta=beta)))
        want = grad(Perceptron(key), batch, REFERENCE)
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), want, 1e-12)


@pytest.mark.slow
def test_a_gradient_flows_through_a_step(batch):
    """The loss after a step, differentiated with respect to `beta` of that step."""
    opt_state = SGD.init(arrays(POLICY))

    @jax.jit
    def after(beta):
        policy, _, _ = dpx.make_step(partial(dpo, beta=beta), SGD)(
            POLICY, opt_state, batch, REFERENCE
        )
        return dpx.make_eval(dpo)(policy, batch, REFERENCE).mean()["loss"]

    step = 1e-4
    want = (after(0.3 + step) - after(0.3 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(after)(0.3), want, rtol=1e-6)


def test_a_gradient_flows_through_a_step_of_the_fast_path(batch):
    policy, reference = Attention(jax.random.key(0)), Attention(jax.random.key(1))

    @jax.jit
    def norm(beta):
        return dpx.make_grad(partial(dpo, beta=beta))(policy, batch, reference)[1]["grad_norm"]

    want = (norm(0.3 + 1e-4) - norm(0.3 - 1e-4)) / 2e-4
    np.testing.assert_allclose(jax.grad(norm)(0.3), want, rtol=1e-6)


def test_eval_shape(batch):
    step = dpx.make_step(dpo, SGD, microbatches=2)
    opt_state = SGD.init(arrays(POLICY))
    policy, _, metrics = eqx.filter_eval_shape(step, POLICY, opt_state, batch, REFERENCE)
    assert policy.embedding.shape == POLICY.embedding.shape
    assert metrics["loss"].shape == ()


def test_a_hundred_steps_compile_once(batch, standard_promotion):
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, 100))

    @eqx.filter_jit
    @chex.assert_max_traces(n=1)
    def train(policy, opt_state, batch, beta):
        return dpx.make_step(partial(dpo, beta=beta), optimizer)(
            policy, opt_state, batch, REFERENCE
        )

    policy, opt_state = POLICY, optimizer.init(arrays(POLICY))
    losses = []
    for i in range(100):
        policy, opt_state, metrics = train(policy, opt_state, batch, jnp.asarray(0.1 + 0.001 * i))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.1 < losses[0]


def test_donation_by_the_documented_recipe(batch, standard_promotion):
    optimizer = optax.adam(1e-2)
    step = dpx.make_step(dpo, optimizer)

    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        batch, reference = frozen
        return step(policy, opt_state, batch, reference)

    # All of it a copy: what is donated is gone, and `POLICY` is needed by other tests.
    policy = dpx.snapshot(POLICY)
    reference = dpx.snapshot(policy)
    opt_state = dpx.snapshot(optimizer.init(arrays(policy)))
    first = policy
    for _ in range(3):
        policy, opt_state, metrics = train((batch, reference), policy, opt_state)
    assert first.embedding.is_deleted()
    assert not reference.embedding.is_deleted()
    assert metrics["loss"] < np.log(2)


def test_trainable_leaves_move_and_no_others(batch, stepped):
    trainable = jax.tree.map(lambda _: False, POLICY)
    trainable = eqx.tree_at(lambda p: p.mlp.layers[1].weight, trainable, replace=True)
    policy, metrics = one_step(batch, trainable=trainable)
    want = eqx.tree_at(lambda p: p.mlp.layers[1].weight, POLICY, stepped[0].mlp.layers[1].weight)
    assert_close(policy, want, 1e-12)
    assert metrics["grad_norm"] < stepped[1]["grad_norm"]


def test_dropout_masks_are_those_of_the_pair(batch):
    policy, key = Perceptron(jax.random.key(0), rate=0.5), jax.random.key(3)
    want = one_step(batch, policy=policy, key=key)
    keys = jax.random.split(key, 8)
    assert_close(one_step(batch, policy=policy, key=keys, microbatches=2), want, 1e-12)
    _, other = one_step(batch, policy=policy, key=jax.random.key(4))
    assert abs(other["loss"] - want[1]["loss"]) > 1e-3


def test_the_reference_has_no_dropout(batch):
    policy = Perceptron(jax.random.key(0))
    dropping = Perceptron(jax.random.key(1), rate=0.5)
    still = eqx.nn.inference_mode(dropping)
    assert_close(
        one_step(batch, policy=policy, reference=dropping, key=jax.random.key(3)),
        one_step(batch, policy=policy, reference=still),
        1e-15,
    )


def test_per_pair_arguments_are_split_with_the_batch(batch):
    beta = np.linspace(0.1, 0.8, 8)
    batch = dataclasses.replace(batch, per_pair={"beta": beta})
    want = one_step(batch)
    assert_close(one_step(batch, microbatches=4), want, 1e-12)
    bound = dataclasses.replace(batch, per_pair=None)
    assert_close(one_step(bound, loss=partial(dpo, beta=jnp.asarray(beta))), want, 1e-12)


def test_your_own_metrics_in_a_line(batch, stepped):
    def metrics(policy, reference, loss):
        largest = {"hit": loss.chosen_reward > 0, "drift": policy.chosen - reference.chosen}
        return dpx.default_metrics(policy, reference, loss) | largest

    _, got = one_step(batch, metrics=metrics, microbatches=2)
    drift = score(POLICY, batch).chosen - score(REFERENCE, batch).chosen
    weight = batch.weight / batch.weight.sum()
    np.testing.assert_allclose(got["drift"], (weight * drift).sum(), rtol=1e-12)
    np.testing.assert_allclose(got["hit"], weight[np.asarray(drift > 0)].sum(), rtol=1e-12)
    np.testing.assert_allclose(got["loss"], stepped[1]["loss"], rtol=1e-12)


def test_compute_dtype_leaves_parameters_and_gradients_wide(batch, standard_promotion):
    policy = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, POLICY)
    seen = set()

    def score(policy, batch, *, key):
        seen.add(policy.embedding.dtype)
        return dpx.score_pairs(policy, batch, key=key)

    grad = dpx.make_grad(dpo, score=score, compute_dtype=jnp.bfloat16, microbatches=2)
    batch = dataclasses.replace(batch, weight=batch.weight.astype(np.float32))
    gradients, _ = eqx.filter_jit(grad)(policy, batch, policy)
    assert seen == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    exact, _ = eqx.filter_jit(dpx.make_grad(dpo))(policy, batch, policy)
    cosine = sum(
        (a * b).sum()
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact), strict=True)
    ) / (optax.tree.norm(gradients) * optax.tree.norm(exact))
    assert cosine > 0.999


@pytest.mark.slow
def test_narrow_parameters_keep_their_dtype_and_their_gradients_are_float32(
    batch, standard_promotion
):
    def narrow(x):
        return x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x

    policy, optimizer = jax.tree.map(narrow, POLICY), optax.adam(1e-2)
    batch = dataclasses.replace(batch, weight=None)
    gradients, _ = eqx.filter_jit(dpx.make_grad(dpo, microbatches=2))(policy, batch, policy)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    opt_state = optimizer.init(arrays(policy))
    step = eqx.filter_jit(dpx.make_step(dpo, optimizer))
    new_policy, new_state, _ = step(policy, opt_state, batch, policy)
    for new, old in zip(*map(jax.tree.leaves, (new_policy, policy)), strict=True):
        assert not eqx.is_array(new) or new.dtype == old.dtype
    for new, old in zip(*map(jax.tree.leaves, (new_state, opt_state)), strict=True):
        assert new.dtype == old.dtype
    assert not eqx.tree_equal(new_policy, policy)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_memory_falls_with_the_number_of_microbatches(microbatches):
    batch = random_batch(pairs=32, prompt=32, completion=64)
    policy = Attention(jax.random.key(0), width=16, length=256)

    def temporary(count):
        step = eqx.filter_jit(dpx.make_grad(dpo, microbatches=count))
        compiled = step.lower(policy, batch, policy).compile()
        return compiled.compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8 * microbatches) < 0.4 * temporary(microbatches)


def test_the_update_fraction_counts_the_trained_numbers_that_changed(batch, stepped):
    """Rows of the embedding that no token uses keep their value, all else of it moves."""
    trainable = jax.tree.map(lambda _: False, POLICY)
    trainable = eqx.tree_at(
        lambda p: (p.embedding, p.mlp.layers[1].bias), trainable, replace=(True, True)
    )
    policy, metrics = one_step(batch, trainable=trainable, update_fraction=True)
    ids = [
        np.unique(tokens.ids[tokens.mask])
        for tokens in (batch.prompt, batch.chosen, batch.rejected)
    ]
    moved = np.asarray(policy.embedding != POLICY.embedding)
    assert moved.sum() == np.unique(np.concatenate(ids)).size * 4
    changed = moved.sum() + (policy.mlp.layers[1].bias != POLICY.mlp.layers[1].bias).sum()
    np.testing.assert_allclose(metrics["update_fraction"], changed / (VOCAB * 4 + VOCAB))
    assert metrics.keys() == {*stepped[1], "update_fraction"}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", 0.7, 1), ("bfloat16", 0, 0.05)])
def test_the_update_fraction_shows_updates_that_are_rounded_away(
    batch, dtype, low, high, standard_promotion
):
    policy = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, POLICY)
    optimizer = optax.adam(1e-6)
    step = eqx.filter_jit(dpx.make_step(dpo, optimizer, update_fraction=True))
    _, _, metrics = step(policy, optimizer.init(arrays(policy)), batch, policy)
    assert low <= metrics["update_fraction"] <= high
