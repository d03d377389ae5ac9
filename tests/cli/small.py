"""A run that takes a second: a tiny model with dropout, and preferences of token ids."""

import json

import numpy as np

from .runs import GOLDEN, lines_of, train

MODEL = GOLDEN / "models" / "families" / "gpt2"
STEPS = 6
SETTINGS = {
    "model": MODEL,
    "batch_size": 4,
    "steps": STEPS,
    "save_every": 2,
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "warmup_steps": 2,
    "dropout": True,
    "buckets": 1,
    "seed": 7,
}


def write_data(path, rows=10, seed=0):
    """Preferences of token ids, ragged."""
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(0, 96, rng.integers(1, 8)).tolist()

    records = [
        {"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()} for _ in range(rows)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def small(folder, **settings):
    """The exit status of a small run whose data and output are in `folder`."""
    data = folder / "data.jsonl"
    if not data.exists():
        write_data(data)
    return train(**{"data": data, "output": folder / "run", **SETTINGS, **settings})


def check_each_step_once(output, steps=STEPS):
    """Asserts that each step has one line of metrics."""
    assert [line["step"] for line in lines_of(output)] == list(range(1, steps + 1))
