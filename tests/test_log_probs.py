"""Log-probabilities of tokens and sequences, against NumPy in float64."""

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from absl.testing import parameterized

import dpo_eqx as dpx


def oracle(logits, targets):
    """The definition, one token after the other."""
    out = np.empty(targets.shape)
    for index in np.ndindex(targets.shape):
        row = logits[index].astype(np.float64)
        out[index] = row[targets[index]] - row.max() - np.log(np.exp(row - row.max()).sum())
    return out


def example(dtype=np.float64, shape=(3, 5), vocab=7, scale=3.0):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(*shape, vocab))).astype(dtype)
    return logits, rng.integers(0, vocab, shape), rng.random(shape) < 0.6


class LogProbVariants(chex.TestCase, parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, with_pmap=True)
    def test_token_and_sequence_log_probs(self):
        logits, targets, mask = example(shape=(8, 3, 5))
        per_token = self.variant(dpx.token_log_probs)(logits, targets)
        np.testing.assert_allclose(per_token, oracle(logits, targets), rtol=1e-13)
        summed = self.variant(dpx.sequence_log_probs)(np.asarray(per_token), mask)
        np.testing.assert_allclose(summed, (oracle(logits, targets) * mask).sum(-1), rtol=1e-13)


def test_gradients():
    logits, targets, mask = example()

    @jax.jit
    def summed(logits):
        return dpx.sequence_log_probs(dpx.token_log_probs(logits, targets), mask).sum()

    jax.test_util.check_grads(summed, (logits,), order=2)


def test_bfloat16_logits_are_summed_in_float32():
    logits, targets, mask = example(shape=(1, 400), vocab=50, scale=1.0)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    got = dpx.token_log_probs(rounded, targets)
    assert got.dtype == jnp.float32
    want = oracle(np.asarray(rounded.astype(jnp.float32)), targets)
    total = dpx.sequence_log_probs(got, np.ones_like(mask))
    # The sum is near -1700, where neighbours in bfloat16 are 8 apart.
    np.testing.assert_allclose(total, want.sum(-1), rtol=1e-6)


@pytest.mark.parametrize("bad", [-np.inf, np.nan, np.inf])
def test_a_masked_row_of_bad_logits_contributes_nothing(bad):
    logits, targets, _ = example(shape=(5,))
    logits[2] = bad
    mask = np.arange(5) != 2

    @jax.jit
    def summed(logits):
        return dpx.sequence_log_probs(dpx.token_log_probs(logits, targets), mask)

    value, gradient = jax.value_and_grad(summed)(jnp.asarray(logits))
    kept = np.delete(logits, 2, axis=0), np.delete(targets, 2)
    np.testing.assert_allclose(value, oracle(*kept).sum(), rtol=1e-13)
    np.testing.assert_array_equal(gradient[2], 0)
    assert np.isfinite(gradient).all()


def test_an_impossible_token_has_log_probability_minus_infinity():
    logits = jnp.array([[0.0, -jnp.inf, 1.0]])
    assert dpx.token_log_probs(logits, jnp.array([1]))[0] == -jnp.inf
    gradient = jax.grad(lambda x: dpx.token_log_probs(x, jnp.array([0]))[0])(logits)
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-15)


@pytest.mark.parametrize("target", [-1, 7, -100])
def test_a_target_outside_the_vocabulary_is_nan_not_its_neighbour(target):
    logits, targets, _ = example(shape=(5,))
    targets[1] = target
    got = dpx.token_log_probs(logits, targets)
    np.testing.assert_array_equal(np.isnan(got), np.arange(5) == 1)


def test_an_empty_mask_sums_to_zero():
    np.testing.assert_array_equal(
        dpx.sequence_log_probs(np.full((2, 3), -np.inf), np.zeros((2, 3), bool)), [0, 0]
    )


def test_large_logits_do_not_overflow():
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    got = dpx.token_log_probs(logits, np.array([1]))
    np.testing.assert_allclose(got, [-2e4])
