"""The running statistics that the caller carries, and the batch's own shift."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import losses

from .cases import CASES, close, draw, records

BCO = next(case for case in CASES if case.name == "bco")
BCO_PAIR = next(case for case in CASES if case.name == "bco_pair")


def test_update_margin_is_an_exponential_average():
    margin = 0.0
    for batch in (1.0, 2.0, -1.0):
        margin = losses.update_margin(margin, batch)
    close(margin, 0.1 * (0.81 * 1.0 + 0.9 * 2.0 - 1.0))
    close(losses.update_margin(2.0, 1.0, decay=0.5), 1.5)


def test_update_delta_is_the_mean_so_far():
    batches, delta = np.array([1.0, 2.0, -1.0, 0.5]), 123.0
    for count, batch in enumerate(batches, 1):
        delta = losses.update_delta(delta, batch, count=count)
        close(delta, batches[:count].mean())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_they_are_carried_through_a_scan(dtype):
    """Arrays in, arrays of the same dtype out: no step recompiles."""
    batches = jnp.asarray([1.0, 2.0, -1.0], dtype)

    def step(carry, batch):
        margin, delta, count = carry
        margin = losses.update_margin(margin, batch)
        return (margin, losses.update_delta(delta, batch, count=count), count + 1), None

    start = (jnp.zeros((), dtype), jnp.zeros((), dtype), jnp.asarray(1, jnp.int32))
    (margin, delta, _), _ = jax.lax.scan(step, start, batches)
    assert margin.dtype == delta.dtype == dtype
    close(margin, 0.161, 1e-6)
    close(delta, 2 / 3, 1e-6)


def test_the_mean_margin_of_the_rewards_is_what_beta_dpo_uses():
    policy, reference = records(CASES[0], draw(CASES[0]))
    result = losses.beta_dpo(policy, reference)
    margin = (result.chosen_reward - result.rejected_reward).mean()
    # With M_0 = M, beta is that of DPO.
    ours = losses.beta_dpo(policy, reference, margin=margin)
    close(ours.loss, losses.dpo(policy, reference).loss)


def test_batch_delta_of_pairs():
    policy, reference = records(BCO_PAIR, draw(BCO_PAIR), weight=np.arange(6.0))
    rewards = losses.bco_pair(policy, reference, beta=0.3)
    middle = np.average((rewards.chosen_reward + rewards.rejected_reward) / 2, weights=np.arange(6))
    got = losses.batch_delta(losses.bco_pair)(policy, reference, beta=0.3)
    close(got.loss, losses.bco_pair(policy, reference, beta=0.3, delta=middle).loss)


def test_batch_delta_of_single_completions_is_halfway_between_the_labels():
    weight = np.arange(1.0, 7.0)
    policy, reference = records(BCO, draw(BCO), weight=weight)
    label, reward = np.asarray(policy.label), losses.bco(policy, reference, beta=0.3).reward
    middle = sum(np.average(reward[side], weights=weight[side]) for side in (label, ~label)) / 2
    got = losses.batch_delta(losses.bco)(policy, reference, beta=0.3)
    close(got.loss, losses.bco(policy, reference, beta=0.3, delta=middle).loss)


def test_batch_delta_with_one_label_only():
    p = draw(BCO)._replace(label=np.ones(6, bool))
    policy, reference = records(BCO, p)
    middle = losses.bco(policy, reference).reward.mean()
    got = losses.batch_delta(losses.bco)(policy, reference)
    close(got.loss, losses.bco(policy, reference, delta=middle).loss)


def test_batch_delta_takes_no_delta():
    policy, reference = records(BCO_PAIR, draw(BCO_PAIR))
    shifted = losses.batch_delta(losses.bco_pair)
    assert list(inspect.signature(shifted).parameters) == ["policy", "reference", "beta"]
    both = losses.combine((1, shifted), (1, losses.bco_pair))(policy, reference, delta=0.3)
    want = shifted(policy, reference).loss + losses.bco_pair(policy, reference, delta=0.3).loss
    close(both.loss, want)


@pytest.mark.parametrize("loss", [losses.dpo, partial(losses.bco, delta=0.2)], ids=["no", "bound"])
def test_batch_delta_of_a_loss_without_a_free_delta(loss):
    message = r"`batch_delta` takes a loss with a keyword `delta`.*; got"
    with pytest.raises(ValueError, match=message):
        losses.batch_delta(loss)
