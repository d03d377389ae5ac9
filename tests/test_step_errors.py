"""What a step refuses, at trace time, and what it says."""

import dataclasses
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx._arrays.log_probs import check_one_shape
from dpo_eqx.losses import dpo

from .policies import Perceptron, arrays, random_batch

POLICY = Perceptron(jax.random.key(0))
BATCH = random_batch()


def gradient(*args, loss=dpo, **options):
    """Traced only: every error here is one of trace time."""
    return eqx.filter_eval_shape(dpx.make_grad(loss, **options), *args)


def test_a_missing_reference_lists_the_ways_to_give_one():
    with pytest.raises(
        ValueError, match=r"`dpo` needs a reference.*`batch.reference`.*`reference_of=`"
    ):
        gradient(POLICY, BATCH)


def test_two_references_at_once():
    reference = dpx.PairLogProbs(np.zeros(8), np.zeros(8))
    batch = dataclasses.replace(BATCH, reference=reference)
    both = "the argument `reference` and `batch.reference`"
    with pytest.raises(ValueError, match=f"Give one reference, not 2: got {both}"):
        gradient(POLICY, batch, POLICY)
    with pytest.raises(ValueError, match="the argument `reference` and `reference_of`"):
        gradient(POLICY, BATCH, POLICY, reference_of=dpx.snapshot)
    with pytest.raises(ValueError, match=r"`batch.reference` and `reference_of`"):
        eqx.filter_eval_shape(dpx.make_eval(dpo, reference_of=dpx.snapshot), POLICY, batch)


def test_a_view_of_what_is_trained_is_no_reference():
    with pytest.raises(
        ValueError, match=r"`reference_of` shows arrays that are trained.*: embedding"
    ):
        gradient(POLICY, BATCH, reference_of=lambda policy: policy)
    first_layer = eqx.tree_at(
        lambda p: p.mlp.layers[0].weight, jax.tree.map(lambda _: False, POLICY), replace=True
    )
    with pytest.raises(ValueError, match=r"policy: mlp.layers.0.weight\. Freeze"):
        gradient(POLICY, BATCH, trainable=first_layer, reference_of=lambda policy: policy)


@pytest.mark.parametrize("beta", [0, -0.1, float("nan")])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match="`beta` must be positive"):
        gradient(POLICY, BATCH, POLICY, loss=partial(dpo, beta=beta))


@pytest.mark.parametrize("label_smoothing", [0.5, -0.1, float("nan")])
def test_label_smoothing_out_of_range(label_smoothing):
    with pytest.raises(ValueError, match=r"`label_smoothing` must be in \[0, 0.5\)"):
        gradient(POLICY, BATCH, POLICY, loss=partial(dpo, label_smoothing=label_smoothing))


@pytest.mark.parametrize("microbatches", [3, 16, 0])
def test_microbatches_that_do_not_divide_the_pairs(microbatches):
    with pytest.raises(ValueError, match=f"divide the pairs.* got {microbatches} for 8 pairs"):
        gradient(POLICY, BATCH, POLICY, microbatches=microbatches)
    with pytest.raises(ValueError, match=f"got {microbatches} for 8 pairs"):
        dpx.precompute_reference(POLICY, BATCH, microbatches=microbatches)


def test_an_array_bound_to_the_loss_where_pairs_are_split():
    loss = partial(dpo, beta=jnp.full(8, 0.1))
    gradient(POLICY, BATCH, POLICY, loss=loss)
    for options in ({"microbatches": 2}, {"axis_name": "data"}):
        with pytest.raises(ValueError, match=r"`beta` of `dpo` .* shape \(8,\).*`batch.per_pair="):
            dpx.make_grad(loss, **options)
    nested = partial(loss, label_smoothing=0.1)
    with pytest.raises(ValueError, match="`beta` of `dpo`"):
        dpx.make_grad(nested, microbatches=2)


def test_an_optimiser_state_for_other_leaves(standard_promotion):
    optimizer = optax.adam(1e-3)
    trainable = eqx.tree_at(
        lambda p: p.embedding, jax.tree.map(lambda _: False, POLICY), replace=True
    )
    step = partial(eqx.filter_eval_shape, dpx.make_step(dpo, optimizer, trainable=trainable))
    with pytest.raises(ValueError, match=r"`opt_state` must be.* has \(16, 8\)\. Make it by"):
        step(POLICY, optimizer.init(arrays(POLICY)), BATCH, POLICY)
    step(POLICY, optimizer.init(eqx.filter(POLICY, trainable)), BATCH, POLICY)


def test_trainable_must_select_what_can_be_differentiated():
    with pytest.raises(ValueError, match="`trainable` must select at least one array"):
        gradient(POLICY, BATCH, POLICY, trainable=lambda leaf: False)
    with pytest.raises(ValueError, match=r"floating-point arrays only.*selects `mlp.activation"):
        gradient(POLICY, BATCH, POLICY, trainable=lambda leaf: True)


def test_a_loss_that_is_reduced():
    def mean(policy, reference):
        losses = dpo(policy, reference)
        return eqx.tree_at(lambda x: x.loss, losses, losses.loss.mean())

    with pytest.raises(ValueError, match=r"one loss per pair, unreduced, shape \(8,\); got \(\)"):
        gradient(POLICY, BATCH, POLICY, loss=mean)


def test_a_metric_that_is_reduced():
    def metrics(policy, reference, loss):
        return {"mean": loss.loss.mean()}

    with pytest.raises(ValueError, match=r"metric 'mean' must have one value per pair.*got \(\)"):
        gradient(POLICY, BATCH, POLICY, metrics=metrics)


@pytest.mark.parametrize("shapes", [((), (2,), (2,)), ((2,), (), (2,))])
def test_the_field_of_the_result_that_was_averaged_is_named(shapes):
    wrong, right = ("loss", "chosen_reward") if shapes[0] == () else ("chosen_reward", "loss")
    match = rf"`{wrong}` must have one value per pair, the shape of `{right}`, \(2,\); got \(\)"

    class Record(eqx.Module):  # a `PairLoss` whose shapes are not checked
        loss: Any
        chosen_reward: Any
        rejected_reward: Any

    with pytest.raises(ValueError, match=match):
        check_one_shape(Record(*map(np.zeros, shapes)), "loss")


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("make", [dpx.make_grad, dpx.make_eval])
def test_an_axis_of_vmap_is_not_an_axis_to_sum_over(make, wrap):
    run = make(dpo, axis_name="data")
    batches = jax.tree.map(lambda x: np.stack([x, x]), BATCH)
    mapped = jax.vmap(lambda b: jax.tree.leaves(run(POLICY, b, POLICY)), axis_name="data")
    with pytest.raises(ValueError, match=r"`axis_name` must name .* got 'data', an axis of `vmap`"):
        wrap(mapped)(batches)


@pytest.mark.parametrize("wrap", [lambda function: function, eqx.filter_jit], ids=["eager", "jit"])
def test_an_axis_that_nothing_binds(wrap):
    grad = dpx.make_grad(dpo, axis_name="data")
    with pytest.raises(ValueError, match="got 'data', which neither of them binds here"):
        wrap(grad)(POLICY, BATCH, POLICY)


def test_a_wrong_shape_is_named_by_the_hook_where_it_is_on():
    with pytest.raises(TypeError, match=r"(?s)parameter 'mask'.*length=3"):
        dpx.sequence_log_probs(jnp.zeros((2, 3)), jnp.ones((2, 4), bool))
    with pytest.raises(TypeError, match=r"(?s)parameter 'rejected'.*pairs=3"):
        dpx.PairLogProbs(jnp.zeros(3), jnp.zeros(4))
