"""The diagnosis: what is planted and counted, by hand; and whether it finds more than chance."""

import re
import subprocess
import sys
from pathlib import Path

import diagnose
import numpy as np
import pytest
from support.vocabulary import Pair

PAIRS = [Pair(b"The inn soup", b" was tasty.", b" was stale."), Pair(b"p", b"c", b"r")] * 10


def test_plant():
    turned, is_planted = diagnose.plant(PAIRS, 0.25, seed=0)
    assert is_planted.sum() == 5
    for pair, now, wrong in zip(PAIRS, turned, is_planted, strict=True):
        assert now.prompt == pair.prompt
        assert (now.chosen, now.rejected) == (pair[2:0:-1] if wrong else pair[1:])


def test_precision_and_recall():
    wrong = np.array([True, True, True, False, False, False, False, False])
    suspected = np.array([True, False, False, True, False, False, False, False])
    assert diagnose.find(suspected, wrong) == (2, 1 / 2, 1 / 3)
    assert diagnose.find(~wrong & wrong, wrong) == (0, 0, 0)


def test_lowest():
    values = np.array([3.0, -1.0, 2.0, -1.0, 0.0])
    assert diagnose.lowest(values, 3).tolist() == [False, True, False, True, True]
    assert diagnose.lowest(np.zeros(4), 2).sum() == 2


def test_labels_against_the_gold_reward():
    turned = [Pair(p.prompt, p.rejected, p.chosen) for p in PAIRS[:1]]
    assert diagnose.against_gold([*PAIRS[:1], *turned]).tolist() == [False, True]


@pytest.mark.slow  # compiling and training
def test_a_short_run_finds_more_than_chance():
    command = [sys.executable, str(Path(diagnose.__file__)), "--steps", "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(the \d+ lowest margins|all pairs).*?\d+  +(0\.\d+)", done.stdout, re.M)
    (_, precision), (_, chance) = rows
    assert float(chance) == 0.1
    assert float(precision) > 0.2
    assert len(re.findall(r"^margin -", done.stdout, re.M)) == 3
