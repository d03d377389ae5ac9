"""Several pairs in one row: pair by pair what each sequence alone gives, in value and gradient."""

import dataclasses
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import data, losses, models, sharding
from dpo_eqx.data._batches.collate import pair_batch

from .policies import VOCAB, Attention, Plain, Recurrent, assert_close, statics

PROMPT, COMPLETION, LENGTH = 6, 5, 24


def make_rows(seed=0):
    """Ragged pairs: empty completions, one-token prompts, one that has a whole row, context."""
    rng = np.random.default_rng(seed)
    sizes = [(1, 1, 1), (6, 5, 0), (1, 0, 0), (6, 5, 5), (2, 0, 4), (5, 3, 2), (3, 1, 5), (4, 4, 4)]
    rows = []
    for number, size in enumerate(sizes):
        ids = [rng.integers(0, VOCAB, n).tolist() for n in size]
        row = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))
        row |= {"weight": float(rng.uniform(0.5, 2)), "beta": float(rng.uniform(0.1, 0.3))}
        rows.append(row | {"reference_chosen": -float(number), "reference_rejected": -2.0})
    empty = {"prompt_ids": [], "chosen_ids": [1, 2, 3], "rejected_ids": [2, 2], "start_id": 0}
    return [*rows, rows[0] | empty]


ROWS = make_rows()
PACKED = data.pack(ROWS, LENGTH, multiple_of=4, dtype=np.float64)
PADDED = pair_batch(ROWS, np.ones(len(ROWS), bool), (PROMPT, COMPLETION), np.float64)


def without_reference(batch):
    if isinstance(batch, dpx.PackedBatch):
        return dataclasses.replace(batch, references=None)
    return dataclasses.replace(batch, reference=None)


def in_order(values):
    """What belongs to the slots of `PACKED`, in the order of `ROWS`."""
    index = np.asarray(PACKED.index)
    there = np.flatnonzero(index >= 0)
    return np.asarray(values)[there[np.argsort(index[there])]]


def decoder(**changes):
    sizes = {"vocab": VOCAB, "width": 8, "layers": 2, "heads": 2, "feed_forward": 8}
    policy = models.Transformer(models.Config(**{**sizes, **changes}), key=jax.random.key(1))
    # Large weights, so that who sees whom matters.
    wide = jax.tree.map(lambda x: 4 * x.astype(np.float64), eqx.filter(policy, eqx.is_array))
    return eqx.combine(wide, policy)


POLICIES = {
    "mask": Attention(jax.random.key(0), dtype=np.float64),
    "windows": decoder(windows=(3, None), heads=4, key_heads=2, unembedding_bias=True),
    "window": decoder(windows=(2, 2), attention_softcap=4.0, softcap=5.0),
    # As many learned positions as the longest sequence has tokens: fewer than a row has.
    "learned": decoder(rotary=None, norm="layer", tied=True, max_length=PROMPT + COMPLETION),
}


@eqx.filter_jit
def value_and_gradient(policy, batch, score, slopes):
    """The log-probabilities, and the gradient of their sum with given slopes."""

    def total(policy):
        log_probs = score(policy, batch)
        return slopes[0] @ log_probs.chosen + slopes[1] @ log_probs.rejected, log_probs

    (_, log_probs), gradient = eqx.filter_value_and_grad(total, has_aux=True)(policy)
    return log_probs, gradient


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("window", "learned", "windows")),
        "mask",
    ],
)
def test_equals_each_sequence_alone(name):
    policy = POLICIES[name]
    slopes = np.random.default_rng(1).normal(size=(2, len(ROWS)))
    spread = np.where(PACKED.index >= 0, slopes[:, PACKED.index], 0)
    want, want_slopes = value_and_gradient(Plain(policy), PADDED, dpx.score_pairs, slopes)
    got, got_slopes = value_and_gradient(policy, PACKED, dpx.score_packed, spread)
    assert_close(jax.tree.map(in_order, got), jax.tree.map(np.asarray, want), 1e-10)
    assert_close(got_slopes, want_slopes.policy, 1e-10)
    empty = np.asarray(PACKED.index) < 0
    assert not np.any(np.asarray(got.chosen)[empty])
    assert not np.any(np.asarray(got.weight)[empty])


SINGLE = [
    {
        "prompt_ids": row["prompt_ids"] or [0],
        "completion_ids": row["chosen_ids"],
        "label": number % 2 == 0,
        "weight": row["weight"],
    }
    for number, row in enumerate(ROWS)
]


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_on_single_completions_is_that_of_padded_ones(microbatches):
    """Of the mean over all scored tokens, with the metrics of the tokens."""
    packed = data.pack(SINGLE, LENGTH, multiple_of=2, dtype=np.float64, average="tokens")
    (padded,) = data.batches(
        SINGLE,
        batch_size=len(SINGLE),
        buckets=1,
        shuffle=False,
        kl=False,
        dtype=np.float64,
        average="tokens",
    )
    policy, metrics = POLICIES["mask"], ("entropy", "accuracy")
    found = []
    for score, batch, parts in (
        (dpx.score_packed_unpaired, packed, microbatches),
        (dpx.score_unpaired, padded, 1),
    ):
        grad = dpx.make_grad(losses.sft, score=partial(score, metrics=metrics), microbatches=parts)
        found.append(eqx.filter_jit(grad)(policy, batch))
    assert_close(*found, 1e-10)


def test_the_score_must_be_that_of_the_batch():
    single = data.pack(SINGLE, LENGTH)
    with pytest.raises(ValueError, match=r"must hold pairs .* Take `score_packed_unpaired`"):
        dpx.score_packed(POLICIES["mask"], single)
    with pytest.raises(ValueError, match=r"must hold single completions .* Take `score_packed`"):
        dpx.score_packed_unpaired(POLICIES["mask"], PACKED)


def test_chunks_change_nothing():
    score = eqx.filter_jit(dpx.score_packed)
    want = score(POLICIES["mask"], PACKED)
    assert_close(score(POLICIES["mask"], PACKED, chunk_size=7), want, 1e-12)


def test_positions_segments_and_mask_token_by_token():
    for lengths in PACKED.lengths:
        layout = dpx.PackedLayout(lengths, LENGTH, PACKED.longest, PACKED.longest_pair)
        # (pair, segment, position) of each token.
        tokens = [
            (pair, segment, place + (lengths[pair][0] if segment else 0))
            for pair in range(len(lengths))
            for segment in range(3)
            for place in range(lengths[pair][segment])
        ]
        real = len(tokens)
        np.testing.assert_array_equal(layout.pairs[:real], [token[0] for token in tokens])
        np.testing.assert_array_equal(layout.segments[:real], [token[1] for token in tokens])
        np.testing.assert_array_equal(layout.positions[:real], [token[2] for token in tokens])
        assert (layout.pairs[real:] == -1).all()
        mask = np.asarray(layout.mask())
        assert mask.diagonal().all()
        for j, (pair, segment, _) in enumerate(tokens):
            for i, (other, part, _) in enumerate(tokens):
                seen = i <= j and other == pair and part in (0, segment)
                assert mask[j, i] == seen, (j, i)
        assert not mask[:real, real:].any()
        assert not mask[real:, :real].any()


class Noisy(Attention):
    """With noise from the key, as dropout would be."""

    def hidden(self, ids, layout, *, key=None):
        hidden = super().hidden(ids, layout)
        noise = 0 if key is None else jax.random.normal(key, hidden.shape, hidden.dtype)
        return hidden + noise


LOSS = losses.dpo
GIVEN = {"score": dpx.score_packed}


@eqx.filter_jit
def gradient(policy, batch, reference=None, *, loss=LOSS, key=None, **settings):
    return dpx.make_grad(loss, **settings)(policy, batch, reference, key=key)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_is_that_of_padded_pairs(microbatches):
    policy = POLICIES["mask"]
    want = gradient(policy, PADDED)
    got = gradient(policy, PACKED, microbatches=microbatches, **GIVEN)
    assert_close(got, want, 1e-10)


def test_a_loss_that_couples_pairs_in_microbatches():
    policy, loss = POLICIES["mask"], losses.bco_pair
    padded = dataclasses.replace(PADDED, per_pair=None)
    packed = dataclasses.replace(PACKED, arguments=None)
    want = gradient(policy, padded, loss=loss)
    assert_close(gradient(policy, packed, loss=loss, microbatches=2, **GIVEN), want, 1e-10)


@pytest.mark.slow
def test_noise_is_the_same_in_microbatches_and_on_devices():
    policy, key = Noisy(jax.random.key(0), dtype=np.float64), jax.random.key(2)
    want = gradient(policy, PACKED, key=key, **GIVEN)
    assert_close(gradient(policy, PACKED, key=key, microbatches=2, **GIVEN), want, 1e-10)
    mesh = sharding.make_mesh("data=2", devices=jax.devices()[:2])
    grad = dpx.make_grad(LOSS, axis_name="data", microbatches=2, **GIVEN)

    def run(arrays, batch):
        gradients, metrics = grad(eqx.combine(arrays, statics(policy)), batch, key=key)
        return eqx.filter(gradients, eqx.is_array), metrics

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    batch = jax.tree.map(jnp.asarray, PACKED)
    got = jax.jit(mapped)(eqx.filter(policy, eqx.is_array), batch)
    assert_close(got, want, 1e-10)


def test_sharded_automatically():
    policy = POLICIES["mask"]
    mesh = sharding.make_mesh("data=4", devices=jax.devices()[:4])
    batch = sharding.shard_batch(PACKED, mesh)
    placed = sharding.shard_policy(policy, mesh)
    assert_close(gradient(placed, batch, **GIVEN), gradient(policy, PACKED, **GIVEN), 1e-10)


@pytest.mark.slow
def test_a_precomputed_reference_is_in_the_order_of_the_batch():
    policy, reference = POLICIES["mask"], Attention(jax.random.key(9), dtype=np.float64)
    batch = without_reference(PACKED)
    assert batch.reference is None
    precompute = eqx.filter_jit(partial(dpx.precompute_reference, score=dpx.score_packed))
    want = precompute(reference, batch)
    got = precompute(reference, batch, microbatches=2)
    assert_close(got, want, 1e-12)
    filled = batch.with_reference(got)
    assert_close(filled.reference, got, 1e-15)
    live = gradient(policy, batch, reference, **GIVEN)
    assert_close(gradient(policy, filled, **GIVEN), live, 1e-12)


def test_the_first_loss_is_log_2_in_bfloat16():
    policy = jax.tree.map(lambda x: x.astype(np.float32), POLICIES["mask"])
    step = {"compute_dtype": jnp.bfloat16, **GIVEN}
    packed = data.pack(ROWS, LENGTH)
    _, metrics = gradient(policy, without_reference(packed), dpx.snapshot(policy), **step)
    assert abs(metrics["loss"] - np.log(2)) < 1e-5


def test_a_step_trains_on_rows_taken_from_a_pack():
    import optax

    policy, optimizer = POLICIES["mask"], optax.sgd(0.1)
    step = eqx.filter_jit(dpx.make_step(LOSS, optimizer, **GIVEN))
    state, seen = optimizer.init(eqx.filter(policy, eqx.is_array)), []
    for rows in np.arange(PACKED.rows).reshape(-1, 2):
        batch = PACKED.take(rows)
        seen += batch.index[batch.index >= 0].tolist()
        policy, state, metrics = step(policy, state, batch)
        assert np.isfinite(metrics["loss"])
    assert sorted(seen) == list(range(len(ROWS)))


def test_a_token_outside_the_vocabulary_is_loud_in_its_pair_alone():
    rows = [dict(row) for row in ROWS]
    rows[3]["chosen_ids"] = [1, VOCAB, 1, 1, 1]
    packed = data.pack(rows, LENGTH, multiple_of=4, dtype=np.float64)
    got = eqx.filter_jit(dpx.score_packed)(POLICIES["mask"], packed)
    assert np.isnan(in_order(got.chosen)).nonzero()[0].tolist() == [3]
    assert np.isfinite(got.rejected).all()


class Blockwise(Attention):
    """Attends by the static widths, which a packed row does not have."""

    def hidden(self, ids, layout, *, key=None):
        return self.tokens[ids][: layout.prompt_width]


class Short(Attention):
    def hidden(self, ids, layout, *, key=None):
        return self.tokens[ids][1:]


def test_errors():
    with pytest.raises(ValueError, match=r"`policy` must offer `FastPolicy` .*Recurrent does not"):
        dpx.score_packed(Recurrent(jax.random.key(0)), PACKED)
    with pytest.raises(AttributeError, match=r"no `prompt_width` .* through `layout.mask\(\)`"):
        dpx.score_packed(Blockwise(jax.random.key(0)), PACKED)
    with pytest.raises(ValueError, match=r"`policy.hidden\(ids, layout\)` must return shape"):
        dpx.score_packed(Short(jax.random.key(0)), PACKED)
    with pytest.raises(ValueError, match="`microbatches` must be positive and divide"):
        gradient(POLICIES["mask"], PACKED, microbatches=3, **GIVEN)
    with pytest.raises(ValueError, match="learned positions for rows of at most 4"):
        dpx.score_packed(decoder(rotary=None, max_length=4), PACKED)


def test_arrays_of_other_slots_are_refused(unchecked):
    with pytest.raises(ValueError, match="`weights` must have one value for each slot"):
        dataclasses.replace(PACKED, weights=PACKED.weights[:1])
