"""`Transformer.start` and `Transformer.extend`: a sequence read in parts, as it is read at once."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import models

from ..policies import Plain, assert_close
from .golden import FOLDER, ragged_batch

KEY = jax.random.key(0)
IDS = np.random.default_rng(0).integers(0, 96, 20)


class ReadsInParts(eqx.Module):
    """A `RecurrentPolicy` alone: `score_pairs` takes a `Transformer` as a `FastPolicy`."""

    policy: models.Transformer

    @property
    def unembedding(self):
        return self.policy.unembedding

    @property
    def unembedding_bias(self):
        return self.policy.unembedding_bias

    @property
    def softcap(self):
        return self.policy.softcap

    def __call__(self, ids):
        return self.policy(ids)

    def start(self, ids, length):
        return self.policy.start(ids, length)

    def extend(self, state, ids):
        return self.policy.extend(state, ids)


def decoder(**options):
    sizes = {"vocab": 96, "width": 8, "layers": 2, "heads": 2, "feed_forward": 8}
    policy = models.Transformer(models.Config(**{**sizes, **options}), key=KEY)
    return jax.tree.map(lambda x: 4 * x.astype(float) if eqx.is_inexact_array(x) else x, policy)


@eqx.filter_jit
def in_parts(policy, prompt, length, *parts, key=None):
    """The hidden states from the last real token of the prompt on."""
    state, hidden = policy.start(prompt, length, key=key)
    found = [hidden[None]]
    for part in parts:
        state, hidden = policy.extend(state, part, key=key)
        found.append(hidden)
    return jnp.concatenate(found)


@eqx.filter_jit
def at_once(policy, ids):
    return policy.hidden(ids, dpx.Layout(jnp.asarray(ids.size), ids.size, ()))


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "qwen3", "phi")), "gemma2"],
)
def test_parts_are_the_whole(name):
    policy = models.load(FOLDER / "families" / name, dtype=jnp.float64)
    # Windows of 12 in gemma2: the last tokens do not see the first ones.
    prompt = np.concatenate([IDS[:7], [95, 3]])
    got = in_parts(policy, prompt, 7, IDS[7:9], IDS[9:18], IDS[18:])
    assert_close(got, at_once(policy, IDS)[6:], 1e-10)


@eqx.filter_jit
@eqx.filter_value_and_grad
def objective(policy, batch):
    scored = dpx.score_pairs(policy, batch)
    return jnp.arange(3.0) @ scored.chosen - 2 * jnp.ones(3) @ scored.rejected


@pytest.mark.slow
def test_scores_and_gradients_in_parts():
    policy = decoder(key_heads=1, unembedding_bias=True, softcap=5.0)
    batch = ragged_batch(0)
    (got, gradient), (want, plain) = (
        objective(wrap(policy), batch) for wrap in (ReadsInParts, Plain)
    )
    assert_close(got, want, 1e-10)
    assert_close(gradient.policy, plain.policy, 1e-10)


@pytest.mark.slow
def test_a_state_is_forked():
    policy = decoder()
    state, _ = policy.start(IDS[:5], 5)
    first = policy.extend(state, IDS[5:8])[1]
    policy.extend(state, IDS[8:12])
    np.testing.assert_array_equal(policy.extend(state, IDS[5:8])[1], first)


@pytest.mark.slow
def test_dropout_needs_a_key():
    policy = decoder(residual_dropout=0.5)
    plain, once, again = (
        in_parts(policy, IDS[:4], 4, IDS[4:6], key=key) for key in (None, KEY, KEY)
    )
    np.testing.assert_array_equal(once, again)
    assert (abs(once - plain).max(axis=1) > 1e-3).all()


@pytest.mark.slow
def test_learned_positions_run_out_token_by_token():
    policy = decoder(rotary=None, norm="layer", max_length=6)
    got = np.asarray(in_parts(policy, IDS[:9], 4, IDS[4:8]))
    assert_close(got[:3], at_once(policy, IDS[:6])[3:], 1e-10)
    np.testing.assert_array_equal(np.isnan(got).all(axis=1), [False, False, False, True, True])
    assert np.isnan(policy.start(IDS[:9], 7)[1]).all()


def test_rotary_embeddings_that_depend_on_the_length():
    grown = models.Rotary(theta=500.0, kind="dynamic", factor=3.0, original_length=10)
    policy = decoder(rotary=grown, max_length=10)
    with pytest.raises(ValueError, match="more than 10; got a sequence of up to 11, read in parts"):
        policy.start(IDS[:11], 3)
    state, _ = eqx.filter_eval_shape(policy.start, jnp.asarray(IDS[:6]), 3)
    with pytest.raises(ValueError, match="more than 10; got a sequence of up to 12, read in parts"):
        eqx.filter_eval_shape(policy.extend, state, jnp.asarray(IDS[6:12]))


def test_it_is_both_kinds_of_policy():
    policy = decoder()
    assert isinstance(policy, dpx.FastPolicy)
    assert isinstance(policy, dpx.RecurrentPolicy)
