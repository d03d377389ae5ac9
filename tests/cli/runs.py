"""Running the command inside the test's process, and reading what it left."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from dpo_eqx.cli import main
from dpo_eqx.cli.settings.parse import flags_of

GOLDEN = Path(__file__).parents[1] / "golden"
DATA, TRACES = GOLDEN / "data", GOLDEN / "models" / "traces"


def with_tokenizer(kind, folder):
    """A folder with a model, `llama`, `qwen3` or `gpt2`, and its tokenizer."""
    shutil.copytree(TRACES / kind / "model", folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (DATA / kind / name).exists():
            shutil.copy(DATA / kind / name, folder)
    return folder


def train(**settings):
    """The exit status of `dpo-eqx train`, without a report where none is asked for."""
    settings = {"report": False} | settings
    lists = {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}
    return main(["train", *flags_of(lists)])


def lines_of(output, name="metrics.jsonl"):
    """The lines of metrics in an output folder."""
    return [json.loads(line) for line in (Path(output) / name).read_text().splitlines()]


def weights_of(output):
    """The tensors of the model in an output folder."""
    return load_file(Path(output) / "model" / "model.safetensors")


def same_weights(one, other):
    """Whether two output folders hold the same model, bit for bit."""
    one, other = weights_of(one), weights_of(other)
    return one.keys() == other.keys() and all(
        np.array_equal(one[name].view(np.uint8), other[name].view(np.uint8)) for name in one
    )
