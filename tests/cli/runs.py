"""Running the command inside the test's process, and reading what it left."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from dpo_eqx.cli import main
from dpo_eqx.cli.run import loop
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


def memory_after_steps(monkeypatch, command):
    """A list that gets, at each step, the kinds of memory of policy, optimiser and reference."""
    kinds, make = [], loop.make_advance

    def watched(*given, **options):
        advance = make(*given, **options)

        def watching(state, *rest):
            state, metrics = advance(state, *rest)
            parts = state.policy, state.opt_state, state.reference
            kinds.append([{x.sharding.memory_kind for x in arrays(part)} for part in parts])
            return state, metrics

        return watching

    def arrays(tree):
        return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]

    monkeypatch.setattr(f"dpo_eqx.cli.commands.{command}.make_advance", watched)
    return kinds
