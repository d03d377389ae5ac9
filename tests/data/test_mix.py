"""`data.mix`: the shares of the sources, the rows that each gives, and what is refused."""

import collections
import itertools

import numpy as np
import pytest

from dpo_eqx import data


def rows(source, count):
    """Rows whose ids say the source and the number of the row; every length differs."""
    return [
        {"prompt_ids": [source, i], "chosen_ids": [1] * (1 + i % 5), "rejected_ids": [2]}
        for i in range(count)
    ]


def names(mixture):
    return [tuple(row["prompt_ids"]) for row in mixture]


# The largest number of rows in these shares without a row twice.
SHARES = [
    ([300, 5000], [0.3, 0.7], [300, 700]),
    ([5000, 300], [7, 3], [700, 300]),
    ([7, 900], [0.07, 0.93], [7, 93]),
    ([1000, 100, 50], [None, None, 0.25], [136, 14, 50]),
    ([1000, 10], [None, 0.5], [10, 10]),
    ([7, 1], [1, 1], [1, 1]),
    ([10, 10_000], [1, 1e6], [1, 10_000]),
    ([40, 60], [None, None], [40, 60]),
]


@pytest.mark.parametrize(("sizes", "weights", "counts"), SHARES)
def test_each_source_gives_its_share_without_a_row_twice(sizes, weights, counts):
    sources = [rows(number, size) for number, size in enumerate(sizes)]
    mixture = data.mix(sources, weights=weights)
    assert list(mixture.counts) == counts
    drawn = names(mixture)
    assert len(set(drawn)) == len(drawn) == len(mixture) == sum(counts)
    assert collections.Counter(s for s, _ in drawn) == dict(enumerate(counts))
    for number in range(len(sizes)):
        of_source = [i for s, i in drawn if s == number]
        assert of_source == sorted(of_source)


def test_sources_without_weights_follow_one_another():
    sources = [rows(0, 3), rows(1, 2)]
    mixture = data.mix(sources)
    assert list(mixture) == [*sources[0], *sources[1]]
    assert str(mixture) == "3 of 3 rows (60.0%), 2 of 2 rows (40.0%)"


def test_the_seed_decides_the_rows_and_their_order():
    sources = [rows(0, 40), rows(1, 400)]

    def drawn(seed):
        return names(data.mix(sources, weights=[1, 1], seed=seed))

    assert drawn(3) == drawn(3) != drawn(4)
    first, other = drawn(3), drawn(4)
    assert {n for n in first if n[0]} != {n for n in other if n[0]}
    # Sources alternate: neither comes in one block.
    changes = sum(a[0] != b[0] for a, b in itertools.pairwise(first))
    assert 20 < changes < 60
    # Neither the first rows alone, nor the last ones.
    assert np.ptp([i for s, i in first if s]) > 300


def test_lengths_belong_to_the_rows():
    mixture = data.mix([rows(0, 30), rows(1, 90)], weights=[0.5, 0.5], seed=1)
    want = [[2, len(row["chosen_ids"]), 1] for row in mixture]
    np.testing.assert_array_equal(mixture.lengths(), want)


def test_batches_of_a_mixture_continue_where_they_were():
    mixture = data.mix([rows(0, 12), rows(1, 40)], weights=[1, 2])
    options = {"batch_size": 4, "seed": 5, "epochs": 2}
    with data.batches(mixture, **options) as batches:
        taken = [next(batches) for _ in range(3)]
        state = batches.get_state()
        after = [batch.prompt.ids.tolist() for batch in batches]
    assert len(taken) + len(after) == 2 * 36 // 4
    with data.batches(mixture, **options) as batches:
        batches.set_state(state)
        assert [batch.prompt.ids.tolist() for batch in batches] == after
    other = data.mix([rows(0, 12), rows(1, 40)], weights=[1, 2], seed=1)
    with (
        data.batches(other, **options) as batches,
        pytest.raises(ValueError, match="same rows"),
    ):
        batches.set_state(state)


WITH_BETA = [rows(1, 1)[0] | {"beta": 0.2}]
UNPAIRED = [{"prompt_ids": [1], "completion_ids": [2], "label": True}]
WRONG = [
    ([], None, "`weights` must hold a number or None for each source, at least one"),
    ([rows(0, 2)], [1, 2], "got 2 for 1 sources"),
    ([rows(0, 2), rows(1, 2)], [1, 0], "`weights` must be positive; got 0"),
    ([rows(0, 2), rows(1, 2)], [1, float("nan")], "`weights` must be positive; got nan"),
    ([rows(0, 2), rows(1, 2)], [1, None], "must sum to less than 1 if a source has none; got 1"),
    ([rows(0, 2), []], None, r"source 1 \(from 0\) has none"),
    ([rows(0, 2), WITH_BETA], None, r"same columns; source 0 has .* source 1 has .*'beta'"),
    ([rows(0, 2), UNPAIRED], None, "same columns; .*'completion_ids', 'label'"),
]


@pytest.mark.parametrize(("sources", "weights", "message"), WRONG)
def test_wrong_mixtures(sources, weights, message):
    with pytest.raises(ValueError, match=message):
        data.mix(sources, weights=weights)


def test_weights_of_pairs_may_be_in_one_source_only():
    weighted = [row | {"weight": 0.5} for row in rows(1, 2)]
    with data.batches(data.mix([rows(0, 2), weighted]), batch_size=4, shuffle=False) as batches:
        np.testing.assert_array_equal(next(batches).weight, np.float32([1, 1, 0.5, 0.5]))
