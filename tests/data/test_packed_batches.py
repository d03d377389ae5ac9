"""Iterators of packed batches: each pair once, one shape, any number of processes, resumable."""

import itertools

import jax
import numpy as np
import pytest

from dpo_eqx import data

from .test_pack import make_rows, unpacked


def epochs_of(batches):
    """The pairs of each epoch, in the order of the batches."""
    steps = [batch.index[batch.index >= 0].tolist() for batch in batches]
    count = batches.steps_per_epoch
    epochs = [steps[i : i + count] for i in range(0, len(steps), count)]
    return [list(itertools.chain.from_iterable(epoch)) for epoch in epochs]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("count", "batch_size", "multiple_of"), [(50, 7, 1), (50, 9, 3), (3, 9, 2)]
)
def test_every_pair_once_in_each_epoch(shuffle, count, batch_size, multiple_of):
    rows = make_rows(count, 3)
    given = {"shuffle": shuffle, "multiple_of": multiple_of, "epochs": 2}
    with data.packed_batches(rows, batch_size=batch_size, **given) as batches:
        first, second = epochs_of(batches)
    assert sorted(first) == sorted(second) == list(range(count))
    if count > 3:
        assert (first == second) != shuffle


def test_one_shape_and_all_tokens():
    rows = make_rows(60, 5)
    found, shapes, weights = {}, set(), 0.0
    with data.packed_batches(rows, batch_size=8, multiple_of=2, dtype=np.float64) as batches:
        for batch in batches:
            shapes.add(tuple(x.shape for x in jax.tree.leaves(batch)))
            found |= unpacked(batch)
            weights += batch.weights.sum()
        account = batches.shapes()
    assert len(shapes) == 1
    assert sorted(found) == list(range(60))
    np.testing.assert_allclose(weights, sum(row["weight"] for row in rows))
    assert account.tokens == sum(len(ids) for parts, *_ in found.values() for ids in parts)
    assert account.padded == account.rows * account.length * batches.steps_per_epoch
    assert f"{account.padding:.1%} padding" in str(account)


def test_processes_share_the_global_batches():
    rows = make_rows(40, 1)
    given = {"batch_size": 12, "multiple_of": 4, "epochs": 2, "seed": 5}
    with data.packed_batches(rows, **given) as batches:
        whole = list(batches)
    parts = []
    for index in range(2):
        shared = {"process_index": index, "process_count": 2}
        with data.packed_batches(rows, **given, **shared) as batches:
            parts.append(list(batches))
    for step, (batch, *both) in enumerate(zip(whole, *parts, strict=True)):
        for name in ("ids", "lengths", "scored", "indices", "weights"):
            joined = np.concatenate([getattr(part, name) for part in both])
            np.testing.assert_array_equal(joined, getattr(batch, name), err_msg=f"step {step}")


def test_a_position_is_restored():
    rows, given = make_rows(40, 1), {"batch_size": 6, "length": 60, "epochs": None}
    with data.packed_batches(rows, **given) as batches:
        for _ in range(9):
            next(batches)
        state = batches.get_state()
        want = [next(batches).index for _ in range(3)]
    with data.packed_batches(rows, **given) as batches:
        batches.set_state(state)
        np.testing.assert_array_equal(want, [next(batches).index for _ in range(3)])
    for other in ({"batch_size": 12}, {"seed": 1}, {"length": 61}, {"shuffle": False}):
        refused = pytest.raises(ValueError, match="`state` must come from")
        with data.packed_batches(rows, **given | other) as batches, refused:
            batches.set_state(state)


@pytest.mark.parametrize(
    ("lengths", "want"),
    [
        # Three pairs of 10 fit into 32 tokens. Two of 20 do not, and three fit into 64.
        ([10] * 30, 32),
        ([20] * 30, 64),
        ([*[64] * 5, *[16] * 40], 64),
    ],
)
def test_the_length_follows_from_the_data(lengths, want):
    rows = [{"prompt_ids": [1], "chosen_ids": [2] * (n - 2), "rejected_ids": [3]} for n in lengths]
    with data.packed_batches(rows, batch_size=20) as batches:
        shapes = batches.shapes()
    padded = {
        length: data.pack(rows, length).ids.size
        for length in range(-(-max(lengths) // 16) * 16, 200, 16)
    }
    assert shapes.length == want
    assert padded[want] <= 1.1 * min(padded.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive integer; got 0"),
        ({"batch_size": 8, "length": 9}, "`length` must hold each pair"),
        ({"batch_size": 8, "process_count": 5}, "`process_count` must divide"),
    ],
)
def test_errors(given, message):
    with pytest.raises(ValueError, match=message):
        data.packed_batches(make_rows(40, 1), **given)
