"""The cost of the loop of `dpo-eqx train` over the bare jitted step, in milliseconds for each step.

    python -m benchmarks.shell

Both run the same program on the same batches in this process, in turns, for a few rounds. They are
compared by the time from the start of one step to the start of the next: by its lowest decile,
since other programs may be running, and by its median. The shell makes the batches, writes
`metrics.jsonl` and shows lines; checkpoints do not count.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax

import dpo_eqx as dpx
from dpo_eqx import data, losses, models
from dpo_eqx.cli.run.checkpoints import Checkpoints
from dpo_eqx.cli.run.folder import Folder
from dpo_eqx.cli.run.loop import Run, loop, make_advance
from dpo_eqx.cli.run.signals import Stop
from dpo_eqx.cli.run.sinks import open_sinks
from dpo_eqx.cli.run.state import State
from dpo_eqx.cli.settings.settings import Settings
from dpo_eqx.cli.terminal.display import display

VOCAB, PAIRS, LENGTH, ROWS = 256, 8, 32, 2048
ROUNDS = 5


class Case:
    """A policy of a given size, with everything that a loop needs."""

    def __init__(self, width: int, layers: int, length: int, steps: int, folder: Path):
        config = models.Config(vocab=VOCAB, width=width, layers=layers, heads=4, tied=True)
        self.steps, self.folder = steps, folder
        self.policy = models.Transformer(config, key=jax.random.key(0))
        self.optimizer = optax.adamw(1e-5)
        self.advance = make_advance(dpx.make_step(losses.dpo, self.optimizer), dropout=False)
        rng = np.random.default_rng(0)
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        # As many rows as real data has: with only 32 rows, Grain's shuffle takes 0.5 ms for each.
        shape = (ROWS, length)
        ids = {name: rng.integers(0, VOCAB, shape).tolist() for name in names}
        self.rows = [{n: ids[n][row] for n in names} for row in range(shape[0])]

    def batches(self) -> data.Batches:
        """The batches that both loops see."""
        return data.batches(self.rows, batch_size=PAIRS, epochs=None, buckets=1)

    def state(self) -> State:
        """A fresh state, since a step donates it."""
        policy = dpx.snapshot(self.policy)
        opt_state = self.optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
        return State(policy, opt_state, dpx.snapshot(policy), jax.random.key(0))

    def bare(self) -> list[float]:
        """The times at which the steps of the bare loop begin."""
        with self.batches() as batches:
            made = [next(batches) for _ in range(4)]
        state, times = self.state(), []
        for number in range(1, self.steps + 1):
            times.append(time.perf_counter())
            state, _ = self.advance(state, made[number % 4], number)
        return times

    def shell(self) -> list[float]:
        """The times at which the steps of the command's loop begin."""
        times: list[float] = []

        def advance(state, batch, number):
            times.append(time.perf_counter())
            return self.advance(state, batch, number)

        settings = Settings(model="", data=("",), output=self.folder, save_every=0)
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as folder,
            open_sinks(settings, Folder(Path(folder)), 0) as (write, write_evaluation),
            self.batches() as batches,
            contextlib.redirect_stdout(io.StringIO()),
            display(0, self.steps) as show,
        ):

            def write_and_show(step, numbers):
                write(step, numbers)
                show(step, numbers)

            run = Run(
                settings=settings,
                steps=self.steps,
                advance=advance,
                evaluate=None,
                batches=batches,
                checkpoints=Checkpoints(Path(folder) / "checkpoints", 1),
                trainable=eqx.is_inexact_array,
                rates=np.zeros(self.steps),
            )
            sinks = {"write": write_and_show, "write_evaluation": write_evaluation}
            loop(run, self.state(), 0, **sinks, stop=Stop())
        return times


def compare(case: Case) -> list[np.ndarray]:
    """The milliseconds of a step, bare and in the shell: lowest decile and median."""
    case.bare()  # compiles
    bare, shell = [], []
    for _ in range(ROUNDS):
        bare += list(np.diff(case.bare()))
        shell += list(np.diff(case.shell()))
    return [1e3 * np.percentile(times, [10, 50]) for times in (bare, shell)]


def main() -> None:
    """Prints a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="also steps of about a second")
    cases = {"short": (32, 1, LENGTH, 200), "middle": (128, 2, 64, 40)}
    if parser.parse_args().long:
        cases["long"] = (256, 4, 192, 6)
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, layers, length, steps) in cases.items():
            bare, shell = compare(Case(width, layers, length, steps, Path(folder)))
            for word, one, other in zip(("decile", "median"), bare, shell, strict=True):
                more = other - one
                print(
                    f"{name:7} {word}  bare {one:9.3f} ms  shell {other:9.3f} ms  "
                    f"more {more:7.3f} ms, {100 * more / one:.2f}%",
                    flush=True,
                )


if __name__ == "__main__":
    main()
