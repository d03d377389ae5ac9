"""Starting `dpo-eqx train` or `online` as several processes on this machine, two devices each."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from dpo_eqx.cli.settings.parse import flags_of

from ..cli.runs import GOLDEN, lines_of, weights_of
from ..cli.small import write_data

SETTINGS = {
    "model": GOLDEN / "models" / "families" / "llama",
    "batch_size": 8,
    "steps": 10,
    "learning_rate": 5e-2,
    "optimizer": "sgd",
    "schedule": "constant",
    "save_every": 4,
    "buckets": 1,
    "resume": True,
    "report": False,
}


class Processes:
    """Some processes of one run, each with its flags; killed at the end of a `with` block."""

    def __init__(
        self, folder: Path, count: int, *, command="train", each=None, devices=2, **settings
    ):
        self.folder, self.output = folder, folder / settings.pop("name", "run")
        if not (folder / "data.jsonl").exists():
            # The last batch of an epoch is ragged.
            write_data(folder / "data.jsonl", rows=30)
        settings = {**SETTINGS, "data": folder / "data.jsonl", "output": self.output, **settings}
        if count > 1:
            settings |= {"coordinator": f"127.0.0.1:{_free_port()}", "num_processes": count}
        self.logs = [folder / f"{self.output.name}-{count}-{i}.log" for i in range(count)]
        self.all = []
        for i, log in enumerate(self.logs):
            own = {
                **settings,
                **({"process_id": i} if count > 1 else {}),
                **(each or {}).get(i, {}),
            }
            self.all.append(_start(command, own, log, devices))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.wait()

    def wait(self, timeout=200):
        """The exit statuses."""
        return [process.wait(timeout) for process in self.all]

    def finish(self, timeout=200):
        """The folder of the run, all having ended well."""
        assert set(self.wait(timeout)) == {0}, self.words()
        return self.output

    def words(self):
        """What all of them have printed."""
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)

    def until_step(self, step, timeout=120):
        """Waits until a step has its line."""
        metrics = self.output / "metrics.jsonl"
        end = time.monotonic() + timeout
        while not (metrics.exists() and metrics.read_text().count("\n") >= step):
            alive = all(process.poll() is None for process in self.all)
            assert alive, self.words()
            assert time.monotonic() < end, self.words()
            time.sleep(0.05)


def _start(command, settings, log, devices):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
        "--xla_backend_optimization_level=0",
        "DPO_EQX_CACHE": str(log.parent / "cache"),
    }
    words = [sys.executable, "-m", "dpo_eqx.cli", command, *flags_of(settings)]
    with log.open("w") as file:
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file)


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def deviation(one, other):
    """The greatest difference of the weights of two runs, relative to each tensor's greatest."""
    got, want = weights_of(one), weights_of(other)
    assert got.keys() == want.keys()
    return max(float(np.abs(got[n] - want[n]).max() / np.abs(want[n]).max()) for n in want)


def check_same(one, other, bound=5e-5):
    """Asserts that two runs end with the same weights, and log the same numbers once."""
    found = deviation(one, other)
    print(f"deviation {found:.1e}")
    assert found < bound
    for got, want in zip(lines_of(one), lines_of(other), strict=True):
        assert got.keys() == want.keys()
        # At the first step policy and reference are the same, and which of them is above is chance.
        chance = {"rewards/accuracies"} if got["step"] == 1 else set()
        names = got.keys() - {"tokens_per_second"} - chance
        for name in names:
            assert abs(got[name] - want[name]) < 2e-4 * (1 + abs(want[name])), (name, got, want)
