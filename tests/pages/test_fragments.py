"""The pages whose blocks are fragments: what a reader has at that place is made here.

Names stay from block to block, as for a reader. `BEFORE` says what is new before a block, by some
words of the block.
"""

import gzip
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import data, losses, models

from ..policies import Perceptron
from .as_users import as_users
from .fences import DOCS, blocks

MODEL = "Qwen/Qwen3-0.6B"
KEY = jax.random.key(0)


def tokens(*shape):
    return dpx.Tokens(jnp.arange(np.prod(shape)).reshape(shape) % 9, jnp.ones(shape, bool))


def batch():
    other = dpx.Tokens(jnp.ones((4, 5), int), jnp.arange(5)[None] < jnp.array([[1], [2], [3], [5]]))
    return dpx.PreferenceBatch(tokens(4, 3), tokens(4, 5), other)


def stepping(make_policy, **options):
    """A policy, its reference and a step, as they are before a loop."""
    policy, optimizer = make_policy(), optax.adam(1e-3)
    return {
        "policy": policy,
        "reference": dpx.snapshot(policy),
        "optimizer": optimizer,
        "opt_state": optimizer.init(eqx.filter(policy, eqx.is_inexact_array)),
        "step": eqx.filter_jit(dpx.make_step(losses.dpo, optimizer, **options)),
        "batches": [batch(), batch()],
    }


def mixture():
    config = models.Config(vocab=16, width=16, layers=2, heads=2, experts=4, experts_per_token=2)
    policy = models.Transformer(config, key=KEY)
    row = tokens(4, 6)
    return {
        "policy": policy,
        "reference": policy,
        "grad": dpx.make_grad(losses.dpo),
        "batch": batch(),
        "ids": row.ids,
        "mask": row.mask,
    }


def demonstrations():
    rows = [{"prompt_ids": [i % 9], "completion_ids": [i % 7, 1]} for i in range(64)]
    return {"rows": rows, "optimizer": optax.sgd(0.1)}


load = partial(models.load, MODEL)
BEFORE = {
    "data.md": {"data.read": lambda: stepping(load)},
    "models.md": {
        "models.load": lambda: {"batches": [batch()]},
        "load_balancing_loss": mixture,
        "query|value": lambda: {"policy": load(), "key": KEY},
        "keyed_lora": lambda: {"model": models.add_lora(load(), rank=2, dropout=0.1, key=KEY)},
        'base="Qwen': lambda: {"policy": models.add_lora(load(), rank=2, key=KEY)},
        "pin_lora": lambda: {"base": load()},
        'target="mlp"': lambda: {"policy": Perceptron(KEY)},
        "models.generate": lambda: {"prompt": tokens(2, 3)},
    },
    "online_command.md": {},
    "seeing.md": {"look": lambda: stepping(load)},
    "sft.md": {"data.batches": demonstrations},
}
MODULES = {
    "data": data,
    "dpx": dpx,
    "eqx": eqx,
    "losses": losses,
    "models": models,
    "optax": optax,
    "partial": partial,
}


@pytest.fixture
def files(workplace):
    """The files that the pages read, and enough pairs for a batch."""
    (workplace / "path" / "to").mkdir(parents=True)
    (workplace / "path" / "to" / "model").symlink_to(workplace / MODEL)
    pairs = (workplace / "preferences.jsonl").read_bytes()
    (workplace / "preferences.jsonl.gz").write_bytes(gzip.compress(8 * pairs))


def run(page):
    """What a reader of the page has in the end. Raises `AssertionError` if a key fits no block."""
    names, left = dict(MODULES), dict(BEFORE[page])
    with as_users():
        for block in blocks(DOCS / page, "python"):
            for words in [words for words in left if words in block][:1]:
                names |= left.pop(words)()
            exec(compile(block, page, "exec"), names)
    assert not left, f"{page}: no block has {list(left)}"
    return names


def test_the_reward_of_the_page_judges_answers():
    brevity = run("online_command.md")["brevity"]
    assert brevity(["why?", "how?"], ["since", "so"]) == [-5, -2]


@pytest.mark.slow
def test_the_loops_of_data_md_train(files):
    names = run("data.md")
    assert names["batches"].get_state() is not None
    assert 0 < float(names["metrics"]["loss"]) < np.log(2)


@pytest.mark.slow
def test_the_fragments_of_models_md_run(files, workplace):
    names = run("models.md")
    assert (workplace / "trained" / "model.safetensors").exists()
    assert names["answers"].ids.shape == (2, 64)


@pytest.mark.slow
def test_the_loop_of_seeing_md_counts_all_pairs(files):
    names = run("seeing.md")
    assert int(names["counted"].calibration.count.sum()) == 8


@pytest.mark.slow
def test_the_batches_of_sft_md_go_through_its_step(files):
    names = run("sft.md")
    policy = Perceptron(KEY)
    state = names["optimizer"].init(eqx.filter(policy, eqx.is_inexact_array))
    with names["batches"] as batches:
        first = next(batches)
    _, _, metrics = names["step"](policy, state, first)
    assert first.pairs == 64
    assert metrics["loss"] > 0
