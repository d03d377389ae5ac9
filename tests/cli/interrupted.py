"""Runs that are interrupted at a step and go on, and what they must leave."""

import os
import signal

from dpo_eqx.cli.run import late_metrics

from .runs import lines_of, same_weights
from .small import STEPS, small

VOLATILE = {"tokens_per_second"}


def steady(output, name="metrics.jsonl"):
    """The lines of a file without the numbers that differ between two runs of the same bits."""
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines_of(output, name)]


def at_line(monkeypatch, step, action):
    """Calls `action` when the line of a step is written."""
    before = late_metrics._check_finite

    def check(number, line):
        before(number, line)
        if number == step:
            action()

    monkeypatch.setattr(late_metrics, "_check_finite", check)


def terminate():
    """What a cluster sends to a run that must end."""
    os.kill(os.getpid(), signal.SIGTERM)


def check_resumes_with_the_same_bits(tmp_path, monkeypatch, *names, **given):
    """Asserts that a small run, terminated after step 3 and resumed, leaves what a whole one does.

    `names` are the files whose lines are compared.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert small(tmp_path, output=whole, **given) == 0
    with monkeypatch.context() as patch:
        at_line(patch, 3, terminate)
        assert small(tmp_path, output=parts, **given) == 0
    assert len(lines_of(parts)) < STEPS
    assert small(tmp_path, output=parts, **given, resume=True) == 0
    assert same_weights(parts, whole)
    for name in names:
        assert steady(parts, name) == steady(whole, name)
