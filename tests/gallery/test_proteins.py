"""Pairs of an assay teach a masked model to rank mutants of other draws."""

import jax
import numpy as np
import proteins
import pytest
from shared import intervals, landscape

from .as_users import as_users, computed

REFERENCE = 0


def test_the_measures_on_ranks_that_are_known():
    fitness = np.array([[0.0, -1.0, 2.0, 1.0], [3.0, 0.0, 1.0, 2.0]])  # the wild type first
    score = np.stack([fitness, -fitness], axis=1)
    results = proteins.Results(["same", "opposite"], fitness, score, np.zeros((2, 2)))
    found = proteins.measures(results)
    np.testing.assert_allclose(found["rank correlation"], [[1, -1], [1, -1]], rtol=1e-12)
    above = found["mutants above the wild type, %"]
    np.testing.assert_allclose(above, [[200 / 3, 100 / 3], [0, 100]], rtol=1e-12)
    assert "the assay" in proteins.table(results)
    assert len(proteins.picture(results).axes) == 3


@pytest.mark.slow
def test_dpo_ranks_mutants_better_after_few_steps():
    found = proteins.measures(computed(proteins, proteins.QUICK))["rank correlation"]
    assert (found[:, -1] > found[:, REFERENCE] + 0.1).all()


@pytest.mark.slow
@as_users()
def test_fitness_is_0_at_the_wild_type_and_mutants_have_two_mutations():
    world = landscape.draw(jax.random.key(0))
    assert abs(float(world.fitness(world.wild_type[None])[0])) < 1e-6
    mutants = np.asarray(landscape.mutants(world.wild_type, jax.random.key(1), 100))
    assert ((mutants != np.asarray(world.wild_type)).sum(axis=1) == 2).all()
    assert mutants.max() < landscape.ACIDS


@pytest.mark.slow
@as_users()
def test_natural_proteins_are_as_frequent_as_the_family_says():
    family, count = landscape.draw(jax.random.key(0)).family, 4000
    second = np.asarray(family.draw(jax.random.key(1), count)[:, 1])
    first = jax.nn.softmax(family.site[0])
    expected = np.asarray(first @ jax.nn.softmax(family.site[1] + family.neighbours))
    found = np.bincount(second, minlength=landscape.ACIDS) / count
    spread = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) < 4 * spread + 1e-9).all()


@pytest.mark.slow
def test_the_claims_hold_with_their_intervals():
    results = computed(proteins, proteins.FULL)
    found = proteins.measures(results)
    correlation, above = found["rank correlation"], found["mutants above the wild type, %"]
    sft, gentle, strong = (results.names.index(x) for x in ("SFT", "DPO, beta 1", "DPO, beta 0.1"))
    for positive in (
        correlation[:, strong] - correlation[:, REFERENCE],
        correlation[:, strong] - correlation[:, sft],
        above[:, strong] - above[:, REFERENCE],
        above[:, strong] - above[:, gentle],
        results.natural[:, REFERENCE] - results.natural[:, strong],
    ):
        mean, half = intervals.interval(positive)
        assert mean - half > 0
