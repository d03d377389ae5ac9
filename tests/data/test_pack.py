"""Packing on the host: every pair once, all its tokens, within the room there is."""

import chex
import numpy as np
import pytest

from dpo_eqx import data
from dpo_eqx.data._batches.pack import first_fit


def make_rows(count, seed):
    """Pairs of random lengths, empty completions and empty prompts among them."""
    rng = np.random.default_rng(seed)
    rows = []
    for size in rng.integers(0, 12, (count, 3)).tolist():
        ids = [rng.integers(10, 99, n).tolist() for n in size]
        row = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))
        rows.append({**row, "start_id": 5, "weight": float(rng.uniform(1, 2))})
    return rows


def unpacked(packed):
    """By number: the ids of the three parts, which of the completions' are scored, the weight."""
    found = {}
    for row, indices in enumerate(packed.indices):
        start = 0
        scored = set(packed.scored[row][packed.scored[row] >= 0].tolist())
        assert len(scored) == (packed.scored[row] >= 0).sum()
        for slot, number in enumerate(indices.tolist()):
            parts, masks = [], []
            for length in packed.lengths[row, slot].tolist():
                places = range(start, start + length)
                parts.append(packed.ids[row, start : start + length].tolist())
                masks.append([place in scored for place in places])
                start += length
            if number < 0:
                assert parts == [[], [], []]
                continue
            assert number not in found
            found[number] = (parts, masks, packed.weights[row, slot])
        assert not packed.ids[row, start:].any()
        assert all(place < start for place in scored)
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("options", [{}, {"slots": 2}, {"scored": 24}, {"multiple_of": 7}])
def test_every_pair_once_with_all_its_tokens(seed, options):
    rows = make_rows(1 + 17 * (seed % 4), seed)
    packed = data.pack(rows, 40, dtype=np.float64, **options)
    found = unpacked(packed)
    assert sorted(found) == list(range(len(rows)))
    assert packed.rows % options.get("multiple_of", 1) == 0
    assert packed.indices.shape[1] <= options.get("slots", len(rows))
    assert packed.scored.shape[1] <= options.get("scored", 40)
    batches = data.batches(rows, batch_size=len(rows), shuffle=False, dtype=np.float64)
    (padded,) = batches
    for number, (parts, masks, weight) in found.items():
        assert weight == padded.weight[number]
        sequences = (padded.prompt, padded.chosen, padded.rejected)
        for tokens, ids, mask in zip(sequences, parts, masks, strict=True):
            np.testing.assert_array_equal(tokens.ids[number, : len(ids)], ids)
            if tokens is not padded.prompt:
                np.testing.assert_array_equal(tokens.mask[number, : len(mask)], mask)
                assert not tokens.mask[number, len(mask) :].any()
            else:
                assert tokens.mask[number].sum() == len(ids) >= 1
                assert not any(mask)
    assert packed.longest_pair == packed.lengths.sum(axis=2).max()
    assert packed.longest == max(len(p) + max(len(c), len(r)) for (p, c, r), *_ in found.values())


def test_values_lie_where_their_pairs_do():
    rows = [
        {**row, "beta": 0.1 * i + 0.1, "reference_chosen": -i, "reference_rejected": -2 * i}
        for i, row in enumerate(make_rows(20, 0))
    ]
    packed = data.pack(rows, 36, multiple_of=4)
    there = packed.index >= 0
    index = packed.index[there]
    np.testing.assert_allclose(packed.per_pair["beta"][there], 0.1 * index + 0.1, rtol=1e-6)
    np.testing.assert_array_equal(packed.reference.chosen[there], -index)
    np.testing.assert_array_equal(packed.reference.rejected[there], -2 * index)
    assert packed.weight.dtype == np.float32
    assert not packed.weight[~there].any()
    # A loss may divide by it.
    assert (packed.per_pair["beta"] > 0).all()


@pytest.mark.parametrize("average", ["rows", "tokens"])
def test_single_completions_are_pairs_without_a_rejected_one(average):
    rows = []
    for number, pair in enumerate(make_rows(20, 3)):
        row = {name: pair[name] for name in ("prompt_ids", "start_id", "weight")}
        row |= {"completion_ids": pair["chosen_ids"], "label": number % 3 > 0}
        row |= {"reference_completion": -number, "beta": 0.1 * number + 0.1}
        rows.append(row | {"completion_mask": [i % 4 < 3 for i in range(len(pair["chosen_ids"]))]})
    packed = data.pack(rows, 30, multiple_of=3, dtype=np.float64, average=average)
    found = unpacked(packed)
    assert sorted(found) == list(range(len(rows)))
    assert packed.rows < len(rows)
    given = {"batch_size": len(rows), "shuffle": False, "kl": False, "average": average}
    (padded,) = data.batches(rows, dtype=np.float64, **given)
    for number, ((_, ids, rejected), (_, mask, _), weight) in found.items():
        assert weight == padded.weight[number]
        np.testing.assert_array_equal(padded.completion.ids[number, : len(ids)], ids)
        np.testing.assert_array_equal(padded.completion.mask[number, : len(mask)], mask)
        assert not padded.completion.mask[number, len(mask) :].any()
        assert rejected == []
    there = packed.index >= 0
    index = packed.index[there]
    np.testing.assert_array_equal(packed.label[there], padded.label[index])
    np.testing.assert_array_equal(packed.reference.completion[there], -index)
    np.testing.assert_array_equal(packed.reference.label[there], padded.label[index])
    np.testing.assert_allclose(packed.per_pair["beta"][there], 0.1 * index + 0.1, rtol=1e-12)


def test_a_completion_without_a_label_is_one_to_learn():
    packed = data.pack([{"prompt_ids": [1], "completion_ids": [2]}] * 3, 4)
    assert packed.label.all()
    assert data.pack(make_rows(3, 0), 40).label is None


def test_rows_are_taken_alike_from_every_array():
    packed = data.pack(make_rows(30, 1), 36)
    part = packed.take(np.array([2, 0]))
    np.testing.assert_array_equal(part.ids, packed.ids[[2, 0]])
    assert part.rows == 2
    assert part.pairs == part.weight.size == 2 * packed.indices.shape[1]
    assert sorted(unpacked(part)) == sorted(packed.indices[[0, 2]][packed.indices[[0, 2]] >= 0])


def test_the_same_rows_give_the_same_batch():
    rows = make_rows(40, 2)
    chex.assert_trees_all_equal(data.pack(rows, 36), data.pack(rows, 36))


@pytest.mark.parametrize("seed", range(5))
def test_few_bins(seed):
    """First-fit decreasing takes at most 11/9 of the fewest bins, and one more."""
    sizes = np.random.default_rng(seed).integers(1, 40, 200)
    needs = np.stack([sizes, np.ones_like(sizes)], axis=1)
    bins = first_fit(needs, np.array([64, 200]))
    assert sorted(item for members in bins for item in members) == list(range(200))
    assert all(sizes[members].sum() <= 64 for members in bins)
    assert len(bins) <= 11 / 9 * np.ceil(sizes.sum() / 64) + 1


def test_a_pair_that_fills_a_row_fits():
    row = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    assert data.pack([row] * 3, 5).rows == 3
    with pytest.raises(ValueError, match=r"`length` must hold each pair.* rows 1 \(5\)\. Take 5"):
        data.pack([{**row, "rejected_ids": []}, row], 4)


def test_errors():
    row = {"prompt_ids": [1], "chosen_ids": [3] * 4, "rejected_ids": [4, 5]}
    with pytest.raises(ValueError, match=r"`length` .* 6 tokens do not .* 4 \(7\) and 2 more"):
        data.pack([row] * 7, 6)
    with pytest.raises(ValueError, match=r"`scored` .* 5 scored tokens do not hold rows 0 \(6\)"):
        data.pack([row], 9, scored=5)
    with pytest.raises(ValueError, match="`rows` must hold a row at least"):
        data.pack([], 9)
    with pytest.raises(ValueError, match=r"`length` must hold each completion with its prompt; 4 "):
        data.pack([{"prompt_ids": [1], "completion_ids": [2] * 4}], 4)
    with pytest.raises(ValueError, match=r"`average` must be .* got 'tokens' for pairs"):
        data.pack([row], 9, average="tokens")
    with pytest.raises(ValueError, match="`slots` must be a positive integer; got 0"):
        data.pack([row], 9, slots=0)
