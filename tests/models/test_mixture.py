"""The mixture of two policies: its distribution, its ends, and what it draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import models

from ..policies import Perceptron

POLICY, REFERENCE = (Perceptron(jax.random.key(i)) for i in (0, 1))
IDS = jnp.asarray([3, 1, 4, 1, 5])


def test_it_is_the_product_of_powers_of_the_probabilities():
    p, q = (np.asarray(jax.nn.softmax(model(IDS))) for model in (POLICY, REFERENCE))
    want = p**0.75 * q**0.25
    want /= want.sum(axis=-1, keepdims=True)
    got = jax.nn.softmax(models.Mixture(POLICY, REFERENCE, 0.25)(IDS))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert abs(want - p).max() > 1e-3


def test_its_ends_are_the_two_policies():
    prompt = dpx.Tokens(np.array([[1, 2], [3, 4]]), np.ones((2, 2), bool))
    options = {"samples": 3, "max_new_tokens": 4, "key": jax.random.key(0)}
    for alpha, one in ((0.0, POLICY), (1.0, REFERENCE)):
        got = models.sample(models.Mixture(POLICY, REFERENCE, alpha), prompt, **options)
        want = models.sample(one, prompt, **options)
        assert np.array_equal(got.tokens.ids, want.tokens.ids)
        np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=1e-12)


def test_alpha_can_be_traced():
    mixed = jax.jit(lambda alpha: models.Mixture(POLICY, REFERENCE, alpha)(IDS))(0.25)
    np.testing.assert_allclose(mixed, models.Mixture(POLICY, REFERENCE, 0.25)(IDS), rtol=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_an_exponent_between_the_two(alpha):
    with pytest.raises(ValueError, match=rf"`alpha` must be in \[0, 1\]; got {alpha}"):
        models.Mixture(POLICY, REFERENCE, alpha)


def test_the_vocabularies_must_be_one():
    def of_five(ids):
        return jnp.zeros((ids.size, 5))

    with pytest.raises(ValueError, match=r"must have one vocabulary; got .*\(5, 11\) and \(5, 5\)"):
        models.Mixture(POLICY, of_five, 0.5)(IDS)
