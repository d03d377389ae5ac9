"""NumPy's numbers and integers where numbers belong, with the shape-checking hook on."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses

from .policies import Perceptron, random_batch

POLICY = Perceptron(jax.random.key(0))
BATCH = random_batch()
PAIR = dpx.PairLogProbs(jnp.array([-3.0, -1.0]), jnp.array([-2.0, -4.0]))
REFERENCE = dpx.PairLogProbs(jnp.array([-2.0, -2.0]), jnp.array([-2.5, -3.0]))


@pytest.mark.parametrize(
    "half",
    [np.float64(0.5), np.float32(0.5), np.array(0.5), np.array(0.5, np.float32), jnp.array(0.5)],
    ids=lambda x: f"{type(x).__name__} {x.dtype}",
)
def test_numbers_of_numpy(standard_promotion, half):
    want = losses.dpo(PAIR, REFERENCE, beta=0.5).loss
    np.testing.assert_array_equal(losses.dpo(PAIR, REFERENCE, beta=half).loss, want)
    moved = dpx.sync_reference(POLICY, POLICY, half)
    np.testing.assert_array_equal(moved.embedding, POLICY.embedding)
    got, want = (eqx.filter_jit(dpx.ld_score(x))(POLICY, BATCH).chosen for x in (half, 0.5))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("two", [np.int64(2), np.uint8(2), np.array(2), jnp.array(2)])
def test_integers(standard_promotion, two):
    want = losses.dpo(PAIR, REFERENCE, beta=2.0).loss
    np.testing.assert_array_equal(losses.dpo(PAIR, REFERENCE, beta=two).loss, want)


@pytest.mark.parametrize("number", [np.float32(-0.5), np.float64(-0.5), np.int64(-1)])
def test_numbers_of_numpy_are_checked_as_those_of_python_are(number):
    with pytest.raises(ValueError, match="`beta` must be positive"):
        losses.dpo(PAIR, REFERENCE, beta=number)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\]"):
        dpx.sync_reference(POLICY, POLICY, number)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\]"):
        dpx.ld_score(number)


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "bool"])
def test_weights_and_arguments_of_the_loss_that_are_integers(dtype):
    counts = np.arange(8) % 2 + (dtype != "bool")
    grad = eqx.filter_jit(dpx.make_grad(losses.dpo))

    def run(numbers):
        batch = dataclasses.replace(BATCH, weight=numbers)
        if dtype != "bool":
            batch = dataclasses.replace(batch, per_pair={"beta": numbers})
        return grad(POLICY, batch, Perceptron(jax.random.key(1)))

    got, want = run(counts.astype(dtype)), run(counts.astype(np.float64))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_a_number_of_numpy_bound_to_the_loss_of_a_step(standard_promotion):
    grad = dpx.make_grad(partial(losses.dpo, beta=np.float32(0.1)), microbatches=2)
    _, metrics = grad(POLICY, BATCH, POLICY)
    np.testing.assert_allclose(metrics["loss"], np.log(2), atol=1e-12)
