"""CHES, against sums of hidden states of each sequence alone, in NumPy from the paper's formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx

from .policies import Attention, Perceptron, random_batch
from .recurrent_policies import LRU


def of_one_pair(policy, prompt, chosen, rejected, mean):
    """Definition 2, from one sequence after the other; the arguments are `Tokens` of one row."""
    reduced = []
    for completion in (chosen, rejected):
        last = np.flatnonzero(completion.mask)
        size = last[-1] + 1 if last.size else 0
        ids = np.concatenate([prompt.ids[prompt.mask], completion.ids[:size]]).astype(np.int32)
        hidden = np.asarray(hidden_of(policy, jnp.asarray(ids)))
        states = hidden[prompt.mask.sum() - 1 :][:size][completion.mask[:size]]
        total = states.sum(axis=0)
        reduced.append(total / max(len(states), 1) if mean else total)
    w, ell = reduced
    return w @ ell - w @ w


def hidden_of(policy, ids):
    if isinstance(policy, Attention):
        return policy.hidden(ids, dpx.Layout(jnp.asarray(ids.size), ids.size, ()))
    return policy.read(policy.zeros(), ids)[1]


def gaps(batch):
    """The batch with tokens of the chosen completions that are not scored, and an empty one."""
    mask = batch.chosen.mask.copy()
    mask[:, 1] = False
    mask[0] = False
    ids = np.where(batch.chosen.ids < 0, 0, batch.chosen.ids)
    return dataclasses.replace(batch, chosen=dpx.Tokens(ids, mask))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", [Attention, LRU])
def test_ches_is_definition_2(kind, mean):
    policy, batch = kind(jax.random.key(0)), gaps(random_batch(pairs=5))
    got = jax.jit(lambda b: dpx.ches(policy, b, length_normalized=mean))(batch)
    for pair, value in enumerate(got):
        row = jax.tree.map(
            lambda x, pair=pair: x[pair], (batch.prompt, batch.chosen, batch.rejected)
        )
        np.testing.assert_allclose(value, of_one_pair(policy, *row, mean), rtol=1e-12, atol=1e-12)


def test_a_policy_without_hidden_states_is_refused():
    with pytest.raises(ValueError, match=r"must offer hidden states.*got a Perceptron"):
        dpx.ches(Perceptron(jax.random.key(0)), random_batch(pairs=2))
