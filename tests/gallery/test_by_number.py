"""The scores of sentences by number are the library's, and training starts at the reference."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared import by_number, sentences, training

import dpo_eqx as dpx
from dpo_eqx import losses

LANGUAGE = sentences.Language(words=2, length=2)
CHAIN = sentences.Chain(jax.random.normal(jax.random.key(0), (2, 3, 3)))
CHOSEN, REJECTED = np.array([6, 0, 3]), np.array([1, 4, 2])


@pytest.mark.slow
def test_pairs_by_number_have_the_librarys_scores():
    weight = jnp.array([1.0, 0.5, 2.0])
    expected = dpx.score_pairs(CHAIN, LANGUAGE.pairs(CHOSEN, REJECTED, weight=weight))
    got = by_number.score_pairs(LANGUAGE)(CHAIN, by_number.Pairs(CHOSEN, REJECTED, weight))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), got, expected)


def test_thumbs_by_number_have_the_librarys_scores():
    label = jnp.array([True, False, True])
    prompt = LANGUAGE.prompt(3)
    rows, kl = LANGUAGE.rows(CHOSEN), LANGUAGE.rows(REJECTED)
    batch = dpx.UnpairedBatch(prompt, rows, label, kl)
    expected = dpx.score_unpaired(CHAIN, batch)
    got = by_number.score_thumbs(LANGUAGE)(CHAIN, by_number.Thumbs(CHOSEN, label, REJECTED))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), got, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_training_raises_what_is_chosen():
    batch, score = by_number.Pairs(CHOSEN, REJECTED), by_number.score_pairs(LANGUAGE)
    loss = partial(losses.dpo, beta=0.5)
    train = partial(training.from_reference, loss, score=score, rate=0.05)
    policy = eqx.filter_jit(train)(CHAIN, batch, steps=5)
    gained = LANGUAGE.log_probs(policy) - LANGUAGE.log_probs(CHAIN)
    assert (gained[CHOSEN] > gained[REJECTED]).all()
