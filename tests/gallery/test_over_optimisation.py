"""Over-optimisation: what the entry claims, on few seeds in the default suite."""

import numpy as np
import over_optimisation
import pytest
from shared.intervals import interval

from .as_users import computed


@pytest.fixture(scope="module")
def quick():
    return computed(over_optimisation, over_optimisation.QUICK)


BETA = over_optimisation.BETAS.index(0.2)


def fall(reward):
    """How far the reward is below its highest value at the end."""
    return reward.max(axis=-1) - reward[..., -1]


def test_the_reward_rises_from_the_reference(quick):
    np.testing.assert_allclose(quick.kl[..., 0], 0, atol=1e-6)
    reward = quick.reward[:, :, BETA]
    assert (reward.max(axis=-1) - reward[..., 0]).min() > 0.2


def test_chi_po_and_early_stopping_stay_closer_to_the_reference(quick):
    dpo, chi_po = quick.kl[:, :, BETA, -1]
    assert (dpo > chi_po + 0.2).all()
    assert (quick.held_out[0, :, BETA].argmin(axis=1) < over_optimisation.QUICK.steps - 100).all()


def test_the_table_and_the_picture_hold_every_run(quick):
    text = over_optimisation.table(quick)
    assert all(f"beta {beta}" in text for beta in over_optimisation.BETAS)
    assert len(over_optimisation.picture(quick).axes) == 2


@pytest.mark.slow
def test_the_mean_reward_falls_but_not_in_every_seed():
    results = computed(over_optimisation, over_optimisation.FULL)
    dpo, chi_po = results.reward[:, :, BETA]
    assert fall(dpo.mean(axis=0)) > 0.1 > fall(chi_po.mean(axis=0))
    mean, half = interval(fall(dpo))
    assert mean - half < 0, "if the fall became significant, the entry should say so"
    mean, half = interval(results.kl[0, :, BETA, -1] - results.kl[1, :, BETA, -1])
    assert mean - half > 0
