"""A decoder learns what held-out pairs share with the pairs of a file in the form of hh-rlhf."""

import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import real_pairs
from shared import intervals

from .as_users import computed


def write(path, count):
    """Pairs whose chosen answer says "sorry", at lengths that say nothing; returns its lines."""
    draw = random.Random(0)

    def dialogue(number, first):
        words = draw.choices(["one", "two", "three"], k=draw.randint(1, 9))
        return f"\n\nHuman: question {number}?\n\nAssistant: {first} {' '.join(words)}"

    pairs = [
        {"chosen": dialogue(number, "sorry"), "rejected": dialogue(number, "sure")}
        for number in range(count)
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(pair) + "\n" for pair in pairs)
    return pairs


def test_dpo_ranks_held_out_pairs_and_each_pair_is_held_out_once(tmp_path):
    pairs = write(path := tmp_path / "pairs.jsonl.gz", 160)
    size = real_pairs.Size(path, names=("dpo",), rows=160, folds=2, epochs=(1, 4))
    results = computed(real_pairs, size)
    everything = np.ones_like(results.longer)
    assert (real_pairs.accuracy(results, "dpo", everything) > 0.9).all()
    assert (real_pairs.accuracy(results, "the shorter answer", results.longer < 0) == 1).all()
    spaces = [pair["chosen"].count(" ") - pair["rejected"].count(" ") for pair in pairs]
    assert sorted(results.longer.ravel()) == sorted(spaces)


@pytest.mark.slow
def test_the_claims_hold_with_their_intervals():
    path = os.environ.get("HH_RLHF_HARMLESS_TEST")
    if path is None:
        pytest.skip("HH_RLHF_HARMLESS_TEST must be the path of harmless-base/test.jsonl.gz")
    results = computed(real_pairs, real_pairs.Size(Path(path)))
    everything, similar = np.ones_like(results.longer), abs(results.longer) <= real_pairs.CLOSE
    by_length, dpo = (
        real_pairs.accuracy(results, name, everything) for name in ("the shorter answer", "dpo")
    )
    for positive in (
        dpo - 0.5,
        dpo - by_length,
        real_pairs.accuracy(results, "dpo", similar) - 0.5,
        real_pairs.accuracy(results, "dpo", results.longer < 0) - dpo,  # it learned length
    ):
        mean, half = intervals.interval(positive)
        assert mean - half > 0
    assert "dpo, per token" in real_pairs.table(results)
    assert len(real_pairs.picture(results).axes) == 3
