"""Noisy labels: what the entry claims, on few seeds in the default suite."""

import jax
import jax.numpy as jnp
import noisy_labels
import numpy as np
import pytest
from shared.intervals import interval

import dpo_eqx as dpx

from .as_users import computed

DPO, CDPO, ROBUST, ROPO = range(4)


@pytest.fixture(scope="module")
def quick():
    return computed(noisy_labels, noisy_labels.QUICK)


def test_margins_shrink_unless_the_loss_is_robust(quick):
    slope = quick.slope.mean(axis=1)  # (losses, rates)
    assert (np.diff(slope[[DPO, CDPO]], axis=1) < 0).all()
    assert slope[DPO, -1] < 0.6 * slope[DPO, 0]
    assert (slope[CDPO, 1:] < slope[DPO, 1:]).all()
    assert slope[ROBUST, -2] / slope[ROBUST, 0] > slope[DPO, -2] / slope[DPO, 0] + 0.1
    np.testing.assert_allclose(slope[[CDPO, ROBUST], 0], slope[DPO, 0], rtol=1e-6)


def test_the_weight_of_a_pair_under_ropo_is_at_most_1_and_falls_if_its_label_looks_wrong():
    def loss(z):
        policy = dpx.PairLogProbs(z[None] / noisy_labels.BETA, jnp.zeros(1))
        return noisy_labels.ropo(policy, jax.tree.map(jnp.zeros_like, policy)).loss[0]

    z = jnp.linspace(-20, 20, 4001)
    weight = -np.asarray(jax.vmap(jax.grad(loss))(z))
    np.testing.assert_allclose(weight.max(), 1, atol=1e-5)
    assert weight[0] < 0.6
    assert weight[-1] < 1e-6


def test_the_table_and_the_picture_hold_every_loss(quick):
    text = noisy_labels.table(quick)
    assert all(name in text for name in noisy_labels.LOSSES)
    assert len(noisy_labels.picture(quick).axes) == 3


@pytest.mark.slow
def test_the_claims_hold_with_their_intervals():
    slope = computed(noisy_labels, noisy_labels.FULL).slope[:, :, 3]  # 30% flipped
    for positive in (slope[ROBUST] - slope[DPO], slope[DPO] - slope[CDPO]):
        mean, half = interval(positive)
        assert mean - half > 0
