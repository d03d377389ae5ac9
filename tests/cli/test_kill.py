"""Runs killed by SIGKILL, at random and while a checkpoint is being written, and resumed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from dpo_eqx.cli.settings.parse import flags_of

from .runs import lines_of, same_weights
from .small import SETTINGS, check_each_step_once, write_data

STEPS = 40


def start(folder, compiled):
    """A run in a process of its own, that goes on where the last one was."""
    settings = {**SETTINGS, "steps": STEPS, "save_every": 4, "keep": 1, "resume": True}
    settings |= {"data": folder.parent / "data.jsonl", "output": folder, "report": False}
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(compiled / "killed"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    with (folder.parent / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dpo_eqx.cli", "train", *flags_of(settings)],
            env=environment,
            stdout=log,
            stderr=log,
        )


def finish(folder, compiled):
    process = start(folder, compiled)
    assert process.wait(300) == 0, (folder.parent / "log").read_text()


def wait_until(seen, process):
    """Waits until `seen()`, or until the process has ended by itself."""
    while process.poll() is None and not seen():
        pass


def kill(process):
    """Whether there was still something to kill."""
    process.kill()
    return process.wait() == -signal.SIGKILL


def is_writing(folder):
    try:
        return any("orbax-checkpoint-tmp" in name for name in os.listdir(folder))
    except FileNotFoundError:
        return False


def kill_while_writing(folder, process, rng):
    wait_until(lambda: is_writing(folder / "checkpoints"), process)
    return kill(process)


def kill_at_random(folder, process, rng):
    """A while after the first step, or before it."""
    before = len(lines_of(folder)) if (folder / "metrics.jsonl").exists() else 0
    wanted = before + rng.randrange(STEPS // 3)

    def seen():
        time.sleep(0.001)
        path = folder / "metrics.jsonl"
        return wanted == before or (path.exists() and path.read_text().count("\n") > wanted)

    wait_until(seen, process)
    time.sleep(rng.random() * 0.1)
    return kill(process)


def check(folder, whole):
    assert same_weights(folder, whole)
    check_each_step_once(folder, STEPS)
    volatile = "tokens_per_second"
    ours, theirs = ([{**line, volatile: 0} for line in lines_of(f)] for f in (folder, whole))
    assert ours == theirs


def killed_and_resumed(tmp_path, compiled, kinds):
    """How many runs were compared: each that ended, and the last; each kill meets a run at work."""
    rng, number = random.Random(0), 0
    write_data(tmp_path / "data.jsonl")
    finish(tmp_path / "whole", compiled)
    for kind in kinds:
        hit = False
        while not hit:
            folder = tmp_path / f"run{number}"
            hit = kind(folder, start(folder, compiled), rng)
            if (folder / "model").exists():
                check(folder, tmp_path / "whole")
                number += 1
    folder = tmp_path / f"run{number}"
    finish(folder, compiled)
    check(folder, tmp_path / "whole")
    return number + 1


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path, compiled):
    killed_and_resumed(tmp_path, compiled, [kill_while_writing])


@pytest.mark.slow
def test_killed_twenty_times(tmp_path, compiled):
    kinds = [kill_at_random, kill_while_writing] * 10
    print(f"20 kills, {killed_and_resumed(tmp_path, compiled, kinds)} runs compared")
