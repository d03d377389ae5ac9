"""TRL's own training runs, from the same text files and checkpoints, by the command.

`tests/golden/models/README.md` says how they were made.
"""

import json

import numpy as np
import pytest

from .runs import DATA, TRACES, lines_of, train

NAMES = [
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
]
# What TRL logs of single tokens.
TOKENS = json.loads((TRACES / "token_metrics.json").read_text())
DEFAULT = [("llama", "adamw_maxlen48_wd_clip")]
SLOW = [
    ("qwen3", "sgd_conversational"),
    ("llama", "sgd"),
    ("llama", "adamw"),
    ("llama", "ipo"),
    ("llama", "ipo_adamw"),
    ("llama", "ga2_sgd"),
    ("llama", "ga2_adamw"),
    ("llama", "sgd_lr5e-2"),
    ("llama", "sgd_refdiff"),
    ("llama", "adamw_refdiff_robust"),
    ("llama", "adamw_precomputed_ref"),
    ("qwen3", "sgd"),
    ("qwen3", "adamw"),
    ("qwen3", "adamw_conversational"),
    ("gpt2", "sgd"),
    ("gpt2", "adamw"),
]


def settings_of(model, name, trace):
    """The flags that say what TRL was told."""
    arguments, parts = trace["arguments"], trace["accumulation"]
    data = "dataset_conversational" if name.endswith("conversational") else "dataset"
    settings = {
        "data": DATA / model / f"{data}.jsonl",
        "shuffle": False,
        "batch_size": 4 * parts,
        "microbatches": parts,
        "steps": 20,
        "max_length": arguments["max_length"],
        "loss": arguments["loss_type"],
        "beta": arguments["beta"],
        "learning_rate": arguments["learning_rate"],
        "schedule": arguments["lr_scheduler_type"],
        "warmup_steps": arguments["warmup_steps"],
        "optimizer": arguments["optim"].split("_")[0],
        "weight_decay": arguments["weight_decay"],
        "max_grad_norm": arguments["max_grad_norm"],
        "buckets": 1,
        "metrics": ["entropy", "accuracy", "logits", "num_tokens"],
    }
    if "robust" in name:
        settings["label_smoothing"] = 0.1
    if trace["reference"] != "model":
        settings["reference"] = TRACES / model / trace["reference"]
    if "precomputed" in name:
        settings["precompute_reference"] = True
    return settings


@pytest.mark.parametrize(
    ("model", "name"), DEFAULT + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_replays(model, name, models, tmp_path):
    trace = json.loads((TRACES / model / f"{name}.json").read_text())
    settings = settings_of(model, name, trace)
    assert train(model=models(model), output=tmp_path / "run", **settings) == 0
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 21))
    bound = 2e-5 if trace["arguments"]["optim"] == "sgd" else 5e-5
    wanted = {key: [step[key] for step in trace["steps"]] for key in NAMES}
    wanted |= TOKENS[f"{model}/{name}"]
    if trace["accumulation"] > 1:
        # TRL averages the means of microbatches, whose numbers of tokens differ.
        for key in ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
            del wanted[key]
    for key, values in wanted.items():
        want = np.array(values)
        got = np.array([line[key] for line in lines])
        deviation = np.abs(got - want) / (1 + np.abs(want))
        print(f"deviation {key} {deviation.max():.1e}")
        assert deviation.max() < bound, (key, deviation)
    rates = [step["learning_rate"] for step in trace["steps"]]
    got = [line["learning_rate"] for line in lines]
    assert np.allclose(got, rates, rtol=1e-12, atol=0)
