"""Batches: what they refuse, and which trees can be made of them."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import dpo_eqx as dpx

from .policies import prefix_masks, random_batch, random_tokens


def tokens(shape, mask=None):
    return dpx.Tokens(np.zeros(shape, int), np.ones(shape, bool) if mask is None else mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": tokens((2, 3, 4))}, "`prompt` must have shape `\\(pairs, prompt\\)`"),
        ({"chosen": tokens((3, 4))}, "`chosen` must have shape .* pairs of `prompt`, 2"),
        ({"rejected": tokens((2, 5))}, r"one width; got \(2, 4\) and \(2, 5\)"),
        ({"rejected": tokens((2, 0)), "chosen": tokens((2, 0))}, "at least one token wide"),
        (
            {"weight": np.ones(3)},
            r"`weight` must have one value per pair, shape \(2,\); got \(3,\)",
        ),
        ({"weight": np.array([1.0, -1.0])}, "`weight` must be finite and not negative"),
        ({"weight": np.array([1.0, np.nan])}, "`weight` must be finite and not negative"),
        ({"per_pair": {"beta": np.ones(5)}}, r"`per_pair\['beta'\]` must have one value per pair"),
        (
            {"reference": dpx.PairLogProbs(np.ones(3), np.ones(3))},
            r"`reference.chosen` must have one value per pair, shape \(2,\)",
        ),
        ({"prompt": tokens((2, 3), prefix_masks([0, 2], 3))}, "row 0 has 0 true positions"),
        ({"prompt": tokens((2, 3), np.array([[1, 0, 1], [1, 1, 1]], bool))}, "prefix .* row 0"),
        ({"prompt": tokens((2, 3), np.array([[1, 1, 1], [0, 1, 1]], bool))}, "prefix .* row 1"),
    ],
)
def test_a_batch_names_what_is_wrong(unchecked, fields, message):
    good = {"prompt": tokens((2, 3)), "chosen": tokens((2, 4)), "rejected": tokens((2, 4))}
    dpx.PreferenceBatch(**good)
    with pytest.raises(ValueError, match=message):
        dpx.PreferenceBatch(**good | fields)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros((2, 3), int), np.ones((2, 4), bool), r"one shape.*\(2, 3\) and \(2, 4\)"),
        (np.zeros((2, 3)), np.ones((2, 3), bool), "`ids` must be integers; got float64"),
        (np.zeros((2, 3), int), np.ones((2, 3)), "`mask` must be boolean; got float64"),
    ],
)
def test_tokens_name_what_is_wrong(unchecked, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        dpx.Tokens(ids, mask)


def test_unpaired_batches_name_what_is_wrong(unchecked):
    good = {"prompt": tokens((2, 3)), "completion": tokens((2, 4)), "label": np.ones(2, bool)}
    assert dpx.UnpairedBatch(**good, kl=tokens((2, 9))).pairs == 2
    with pytest.raises(ValueError, match="`label` must be boolean"):
        dpx.UnpairedBatch(**good | {"label": np.ones(2)})
    with pytest.raises(ValueError, match="`label` must have one value per pair"):
        dpx.UnpairedBatch(**good | {"label": np.ones(3, bool)})
    with pytest.raises(ValueError, match="`kl` must have shape"):
        dpx.UnpairedBatch(**good, kl=tokens((3, 4)))


def test_trees_of_anything_can_be_made_of_a_batch():
    batch = random_batch(reference=dpx.PairLogProbs(np.zeros(8), np.zeros(8)))
    specs = jax.tree.map(lambda _: PartitionSpec("data"), batch)
    assert specs.chosen.ids == PartitionSpec("data")
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    assert structs.reference.chosen.shape == (8,)
    axes = jax.tree.map(lambda _: 0, batch)
    sums = jax.vmap(lambda b: b.prompt.mask.sum(), in_axes=(axes,))(batch)
    assert sums.shape == (8,)


def test_a_batch_can_be_made_inside_a_transformation():
    batch = random_batch()

    @jax.jit
    def rebuilt(batch):
        doubled = dataclasses.replace(batch, weight=2 * batch.weight)
        return dpx.PreferenceBatch(*(getattr(doubled, n) for n in ("prompt", "chosen", "rejected")))

    assert eqx.tree_equal(rebuilt(batch).chosen, jax.tree.map(jnp.asarray, batch.chosen))


def test_jax_arrays_on_the_host_are_checked_like_numpy_ones():
    with pytest.raises(ValueError, match="row 1 has 0 true positions"):
        dpx.PreferenceBatch(
            jax.tree.map(jnp.asarray, tokens((2, 3), prefix_masks([2, 0], 3))),
            tokens((2, 4)),
            tokens((2, 4)),
        )


def test_from_sequences_finds_the_shared_prompt():
    batch = dpx.PreferenceBatch.from_sequences(
        np.array([[5, 6, 7, 8, 9, 0], [1, 2, 3, 0, 0, 0]]),
        np.array([[0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0]], bool),
        np.array([[5, 6, 7, 4, 0], [1, 2, 2, 2, 2]]),
        np.array([[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]], bool),
        weight=np.array([1.0, 3.0]),
    )
    np.testing.assert_array_equal(batch.prompt.ids, [[5, 6, 7], [1, 0, 0]])
    np.testing.assert_array_equal(batch.prompt.mask.sum(1), [3, 1])
    np.testing.assert_array_equal(batch.chosen.ids, [[8, 9, 0, 0], [2, 3, 0, 0]])
    np.testing.assert_array_equal(batch.chosen.mask.sum(1), [2, 2])
    # The second rejected row scores from its fourth token on; before that it is context.
    np.testing.assert_array_equal(batch.rejected.ids, [[4, 0, 0, 0], [2, 2, 2, 2]])
    np.testing.assert_array_equal(batch.rejected.mask, [[1, 0, 0, 0], [0, 0, 1, 1]])
    np.testing.assert_array_equal(batch.weight, [1.0, 3.0])


def test_from_sequences_keeps_what_differs_before_the_response_as_context():
    batch = dpx.PreferenceBatch.from_sequences(
        np.array([[5, 6, 7, 8]]), np.array([[0, 0, 0, 1]], bool),
        np.array([[5, 9, 7, 8]]), np.array([[0, 0, 0, 1]], bool),
    )  # fmt: skip
    np.testing.assert_array_equal(batch.prompt.ids, [[5]])
    np.testing.assert_array_equal(batch.chosen.ids, [[6, 7, 8]])
    np.testing.assert_array_equal(batch.rejected.ids, [[9, 7, 8]])
    np.testing.assert_array_equal(batch.chosen.mask, [[0, 0, 1]])


def test_from_sequences_takes_an_empty_response():
    batch = dpx.PreferenceBatch.from_sequences(
        np.array([[5, 6, 7]]), np.array([[0, 0, 1]], bool),
        np.array([[5, 6, 0]]), np.array([[0, 0, 0]], bool),
    )  # fmt: skip
    np.testing.assert_array_equal(batch.prompt.ids, [[5, 6]])
    np.testing.assert_array_equal(batch.rejected.mask, [[False]])


@pytest.mark.parametrize(
    ("chosen", "mask", "message"),
    [
        ([[1, 2], [4, 5]], [[0, 1], [0, 1]], "got none in row 1"),
        ([[1, 2], [3, 4]], [[0, 1], [1, 1]], "got none in row 1"),
        ([[1, 2]], [[0, 1]], "one row per pair"),
    ],
)
def test_from_sequences_wants_a_shared_first_token(unchecked, chosen, mask, message):
    rejected = np.array([[1, 3], [3, 3]]), np.array([[0, 1], [0, 1]], bool)
    with pytest.raises(ValueError, match=message):
        dpx.PreferenceBatch.from_sequences(np.array(chosen), np.array(mask, bool), *rejected)


def test_random_tokens_are_no_tokens_under_the_padding():
    made = random_tokens(np.random.default_rng(0), prefix_masks([1, 3], 3))
    assert (made.ids[~made.mask] == -7).all()
