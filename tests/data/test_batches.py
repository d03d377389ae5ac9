"""Batches: every row once an epoch, the same on any number of processes, resumable."""

import itertools
import json
import threading

import chex
import numpy as np
import pytest

from dpo_eqx import data
from dpo_eqx.data._batches.buckets import choose_buckets


def make_rows(count, seed=0, longest=60):
    """Rows whose first prompt token is their number, of random lengths."""
    rng = np.random.default_rng(seed)
    sizes = 1 + rng.integers(0, longest, (count, 3)) ** 2 // longest
    return [
        {
            "prompt_ids": [i, *[1] * p],
            "chosen_ids": [2] * c,
            "rejected_ids": [3] * r,
        }
        for i, (p, c, r) in enumerate(sizes.tolist())
    ]


ROWS = make_rows(53)


def numbers(batch):
    return batch.prompt.ids[:, 0][batch.weight > 0].tolist()


def global_batch(parts):
    return np.concatenate([part.prompt.ids[:, 0] * (part.weight > 0) for part in parts])


@pytest.mark.parametrize("window", [1, 3, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_once_an_epoch(shuffle, window):
    batches = data.batches(ROWS, batch_size=8, shuffle=shuffle, seed=1, epochs=3, window=window)
    taken = list(batches)
    assert len(batches) == len(taken) == 21
    orders = [[n for b in taken[e * 7 : e * 7 + 7] for n in numbers(b)] for e in range(3)]
    assert all(sorted(order) == list(range(53)) for order in orders)
    assert (orders[0] != orders[1]) == shuffle
    assert (orders[0] == list(range(53))) == (not shuffle)


def test_rows_are_padded_and_masked_from_their_lengths():
    for batch in data.batches(ROWS, batch_size=8):
        for i, number in enumerate(numbers(batch)):
            row = ROWS[number]
            for name in ("prompt", "chosen", "rejected"):
                tokens, ids = getattr(batch, name), row[f"{name}_ids"]
                assert tokens.ids[i, : len(ids)].tolist() == ids
                assert tokens.mask[i].tolist() == [j < len(ids) for j in range(tokens.ids.shape[1])]
        assert batch.prompt.ids.dtype == np.int32
        assert batch.weight.dtype == np.float32


def test_a_ragged_batch_is_filled_by_weight_0():
    *_, last = data.batches(ROWS, batch_size=8)
    assert last.weight.tolist() == [1] * 5 + [0] * 3
    assert last.prompt.mask[5:].any(axis=1).all()


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_share_the_global_batches(processes, shuffle):
    settings = {"batch_size": 8, "shuffle": shuffle, "seed": 4, "epochs": 2}
    alone = data.batches(ROWS, **settings)
    shares = [
        data.batches(ROWS, **settings, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    assert {len(share) for share in shares} == {len(alone)}
    for whole, *parts in zip(alone, *shares, strict=True):
        assert np.array_equal(global_batch([whole]), global_batch(parts))
        for part in parts:
            assert part.pairs == 8 // processes
            for name in ("prompt", "chosen", "rejected"):
                assert getattr(part, name).ids.shape[1] == getattr(whole, name).ids.shape[1]


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("steps", [0, 1, 6, 7, 13, 21])
def test_resumed_anywhere_it_goes_on_the_same(steps, prefetch):
    settings = {"batch_size": 8, "seed": 2, "epochs": 3, "prefetch": prefetch}
    batches = data.batches(ROWS, **settings)
    for _ in range(steps):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    rest = list(batches)
    other = data.batches(ROWS, **settings)
    next(other)
    other.set_state(state)
    assert other.get_state() == state
    resumed = list(other)
    assert len(resumed) == len(rest) == 21 - steps
    for one, two in zip(rest, resumed, strict=True):
        chex.assert_trees_all_equal(one, two)


def test_a_state_goes_to_another_number_of_processes_but_not_to_other_batches():
    batches = data.batches(ROWS, batch_size=8, seed=2)
    next(batches)
    state = batches.get_state()
    share = data.batches(ROWS, batch_size=8, seed=2, process_index=1, process_count=2)
    share.set_state(state)
    assert np.array_equal(next(share).prompt.ids, next(batches).prompt.ids[4:])
    others = [(ROWS[1:], {}), (ROWS, {"seed": 3}), (ROWS, {"batch_size": 4}), (ROWS, {"window": 2})]
    for rows, change in [*others, (ROWS, {"shuffle": False}), (ROWS, {"buckets": 2})]:
        other = data.batches(rows, **({"batch_size": 8, "seed": 2} | change))
        with pytest.raises(ValueError, match="`state` must come from batches of the same rows"):
            other.set_state(state)


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = set()
    for seed in range(3):
        batches = data.batches(ROWS, batch_size=53, seed=seed, epochs=3)
        orders |= {tuple(numbers(batch)) for batch in batches}
    assert len(orders) == 9


class Watched(list):
    """Rows that note which thread asks for them."""

    def __getitem__(self, index):
        self.threads.add(threading.get_ident())
        return super().__getitem__(index)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_are_made_ahead_on_another_thread(prefetch):
    rows = Watched(ROWS)
    rows.threads = set()
    with data.batches(rows, batch_size=8, prefetch=prefetch) as batches:
        next(batches)
    assert (threading.get_ident() in rows.threads) == (prefetch == 0)


def test_endless():
    with data.batches(ROWS, batch_size=8, epochs=None) as batches:
        for _ in range(30):
            next(batches)
    assert batches.get_state()["step"] == 30


def least_padding(lengths, count):
    """By trying every choice of widths."""
    top = max(lengths)
    choices = itertools.combinations(sorted({*lengths} - {top}), min(count, len({*lengths})) - 1)
    return min(sum(min(w for w in (*c, top) if w >= n) for n in lengths) for c in choices)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_widths_are_those_of_least_padding(count):
    rng = np.random.default_rng(count)
    for _ in range(20):
        lengths = rng.integers(1, 12, (rng.integers(1, 15), 2))
        buckets = choose_buckets(lengths, count, 1)
        for widths, column in zip(vars(buckets).values(), lengths.T, strict=True):
            got = sum(min(w for w in widths if w >= n) for n in column)
            assert got == least_padding(column.tolist(), count)
            assert len(widths) <= count


def test_shapes_are_few_and_told():
    rows = make_rows(600)
    for settings in ({}, {"shuffle": False}, {"buckets": 2, "multiple_of": 8}, {"window": 1}):
        batches = data.batches(rows, batch_size=8, **settings)
        told = batches.shapes()
        taken = list(batches)
        seen = {(b.prompt.ids.shape[1], b.chosen.ids.shape[1]) for b in taken}
        assert seen == set(told.steps)
        assert len(seen) <= settings.get("buckets", 4) ** 2
        sides = [side for b in taken for side in (b.prompt, b.chosen, b.rejected)]
        assert told.padded == sum(side.ids.size for side in sides)
        assert told.tokens == sum(len(ids) for row in rows for ids in row.values())
    grouped, plain, single = (
        data.batches(rows, batch_size=8, **s).shapes() for s in ({}, {"window": 1}, {"buckets": 1})
    )
    assert grouped.padding < plain.padding < single.padding
    assert "shapes to compile over 75 steps" in str(grouped)


def test_numbers_travel():
    extra = {"weight": 2.0, "beta": 0.5, "reference_chosen": -1.5, "reference_rejected": -2.0}
    rows = [row | extra | {"weight": float(i)} for i, row in enumerate(ROWS[:3])]
    batch = next(data.batches(rows, batch_size=4, shuffle=False, dtype=np.float64))
    assert batch.weight.tolist() == [0, 1, 2, 0]
    assert batch.per_pair["beta"].tolist() == [0.5] * 4
    assert batch.reference.chosen.tolist() == [-1.5] * 4
    assert batch.reference.rejected.dtype == np.float64
    counts = [len(row["chosen_ids"]) for row in [*rows, rows[0]]]
    assert batch.reference.chosen_length.tolist() == counts


def test_nothing_before_the_first_token_leaves_it_unscored():
    tokenizer = type("Plain", (), {"eos_token_id": 9, "encode": lambda _, text: [*text.encode()]})()
    pairs = [("yes", "yet"), ("yes", "no"), ("y", "y")]
    records = [{"prompt": "", "chosen": c, "rejected": r} for c, r in pairs]
    rows, report = data.tokenize(records, tokenizer)
    assert [row["prompt_ids"] for row in rows] == [[]] * 3
    assert report.noted["nothing_before_completion"] == 3
    batch = next(data.batches(rows, batch_size=3, shuffle=False))
    # A shared first token is the prompt; else the EOS stands before both, and they start unscored.
    assert batch.prompt.ids[:, 0].tolist() == [ord("y"), 9, ord("y")]
    assert batch.chosen.ids[0, :3].tolist() == [*b"es", 9]
    assert batch.chosen.ids[1, :4].tolist() == [*b"yes", 9]
    assert batch.rejected.mask[1, :4].tolist() == [False, True, True, False]
    for side, sizes in ((batch.chosen, (3, 3, 1)), (batch.rejected, (3, 2, 1))):
        assert side.mask.sum(axis=1).tolist() == list(sizes)


def test_an_empty_prompt_that_cannot_be_placed_is_named():
    rows = [{"prompt_ids": [], "chosen_ids": [1], "rejected_ids": [2]}]
    with pytest.raises(ValueError, match=r"`prompt_ids` must hold a token .*got an empty prompt"):
        next(data.batches(rows, batch_size=1))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive integer; got 0"),
        ({"batch_size": 4, "epochs": 0}, "`epochs` must be a positive integer; got 0"),
        ({"batch_size": 4, "process_count": 3}, "`process_count` must divide `batch_size`"),
        ({"batch_size": 4, "process_index": 1}, "`process_index` must be below it"),
        ({"batch_size": 4, "seed": -1}, "`seed` must not be negative"),
        (
            {"batch_size": 4, "buckets": data.Buckets((8,), (16,))},
            "`buckets` must hold the longest",
        ),
    ],
)
def test_bad_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        data.batches(ROWS, **settings)
    with pytest.raises(ValueError, match="`rows` must hold a row at least"):
        data.batches([], batch_size=1)
    with pytest.raises(ValueError, match="`prompt` of `Buckets` must be ascending"):
        data.Buckets((8, 8), (16,))


KINDS = [
    {"prompt_ids": [i % 6], "completion_ids": [i, *[1] * (i % 9)], "label": i % 3 == 0}
    for i in range(40)
]


def drawn(batches):
    """The row of each mismatched completion, by the row that it is put after."""
    return {
        int(own): int(other)
        for batch in batches
        for own, other, w in zip(
            batch.completion.ids[:, 0], batch.kl.ids[:, 0], batch.weight, strict=True
        )
        if w
    }


def test_mismatched_completions_are_drawn_over_the_whole_set():
    pairs = drawn(data.batches(KINDS, batch_size=4, seed=3))
    assert sorted(pairs) == list(range(40))
    assert all(own % 6 != other % 6 for own, other in pairs.items()), "of another prompt"
    assert len(set(pairs.values())) > 25
    assert sum(abs(own - other) > 8 for own, other in pairs.items()) > 20


def test_mismatched_completions_depend_on_the_seed_alone():
    first = drawn(data.batches(KINDS, batch_size=4, seed=3))
    assert drawn(data.batches(KINDS, batch_size=10, seed=3, shuffle=False)) == first
    assert drawn(data.batches(KINDS, batch_size=4, seed=3, epochs=2)) == first
    shares = [
        data.batches(KINDS, batch_size=4, seed=3, process_index=i, process_count=2) for i in (0, 1)
    ]
    assert drawn(itertools.chain(*shares)) == first
    assert drawn(data.batches(KINDS, batch_size=4, seed=4)) != first


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_widest_batch_of_an_epoch_without_moving(shuffle):
    batches = data.batches(make_rows(60), batch_size=8, multiple_of=8, shuffle=shuffle)
    first = next(batches)
    state, widest = batches.get_state(), batches.widest()
    assert batches.get_state() == state
    areas = [b.prompt.ids.size + 2 * b.chosen.ids.size for b in (first, *batches)]
    assert widest.prompt.ids.size + 2 * widest.chosen.ids.size == max(areas)
    assert min(areas) < max(areas)


def test_unpaired_batches():
    extra = {"weight": 2.0, "reference_completion": -1.0}
    rows = [row | extra for row in KINDS]
    told = data.batches(rows, batch_size=4, multiple_of=2).shapes()
    taken = list(data.batches(rows, batch_size=4, multiple_of=2))
    sides = [side for b in taken for side in (b.prompt, b.completion, b.kl)]
    assert told.padded == sum(side.ids.size for side in sides)
    assert told.tokens == sum(int(side.mask.sum()) for side in sides)
    for batch in taken:
        assert batch.label.tolist() == [bool(KINDS[i]["label"]) for i in batch.completion.ids[:, 0]]
        assert batch.reference.completion.tolist() == [-1.0] * 4
    assert next(data.batches(rows, batch_size=4, kl=False)).kl is None


def test_mismatched_completions_stay_within_the_length():
    for batch in data.batches(KINDS, batch_size=4, max_length=5):
        assert (batch.prompt.mask.sum(axis=1) + batch.kl.mask.sum(axis=1)).max() <= 5


class Counted(list):
    """Rows that count how often one of them is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += isinstance(index, int)
        return super().__getitem__(index)


@pytest.mark.parametrize("others", [[0], [700, 701]])
def test_the_search_for_a_mismatch_is_linear(others):
    """With one prompt in nearly all rows, each search would pass nearly all of them."""
    count = 2000
    rows = Counted(
        {"prompt_ids": [2 if i in others else 1], "completion_ids": [i, 5], "label": True}
        for i in range(count)
    )
    pairs = drawn(data.batches(rows, batch_size=100, seed=1))
    assert len(pairs) == count
    assert all((own in others) != (other in others) for own, other in pairs.items())
    # Each row in its batch, its prompt and its partner, and once on the way of a search.
    assert rows.reads < 12 * count


def test_one_prompt_has_no_mismatch():
    rows = [row | {"prompt_ids": [1]} for row in KINDS]
    with pytest.raises(ValueError, match="`rows` must have two different prompts"):
        data.batches(rows, batch_size=4)


def test_a_state_of_other_rows_of_the_same_lengths_is_refused():
    rows = [{"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]} for _ in range(4)]
    with data.batches(rows, batch_size=2) as batches:
        next(batches)
        state = batches.get_state()
    others = [*rows[:3], rows[3] | {"rejected_ids": [5]}]
    with (
        data.batches(others, batch_size=2) as batches,
        pytest.raises(ValueError, match="`state` must come from batches of the same rows"),
    ):
        batches.set_state(state)
