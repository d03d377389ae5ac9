"""Losses that couple pairs in a step: neither microbatches nor devices change the parameters.

With SGD, in float64, with unequal weights and pairs of weight 0.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from ..policies import arrays, assert_close
from .in_step import COUPLED, POLICY, ROADS, plainly

TOLERANCE = 1e-9
want = functools.cache(lambda name: plainly(COUPLED[name]))


# Each road once by default, each loss with the slow ones; the slow test below is the product.
@pytest.mark.parametrize(
    ("name", "road", "devices", "microbatches"),
    [
        ("aot", "shard_map", 8, 2),
        pytest.param(*("aot_unpaired", "pmap", 2, 1), marks=pytest.mark.slow),
        pytest.param(*("beta_dpo", "automatic", 8, 2), marks=pytest.mark.slow),
        ("kto", "shard_map_unchecked", 2, 4),
        pytest.param(*("bco", "shard_map", 2, 1), marks=pytest.mark.slow),
        ("bco_pair", "pmap", 8, 4),
        ("centred", "automatic", 1, 4),
    ],
)
def test_every_loss_and_every_road(name, road, devices, microbatches):
    got = ROADS[road](COUPLED[name], devices, microbatches)
    assert_close(got, want(name), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("road", "devices", "microbatches"), [*itertools.product(ROADS, [1, 2, 8], [1, 2, 4])]
)
@pytest.mark.parametrize("name", COUPLED)
def test_the_product(name, road, devices, microbatches):
    got = ROADS[road](COUPLED[name], devices, microbatches)
    assert_close(got, want(name), TOLERANCE)


@pytest.mark.parametrize("name", COUPLED)
def test_the_step_is_a_step(name):
    """Every parameter moves, by far more than the tolerance; the losses differ."""
    policy, loss = want(name)
    for before, after in zip(*map(jax.tree.leaves, (arrays(POLICY), policy)), strict=True):
        assert np.abs(np.asarray(before - after)).max() > 1e-5
    others = [want(other)[1] for other in COUPLED if other != name]
    assert np.abs(np.asarray(others) - loss).min() > 1e-4
