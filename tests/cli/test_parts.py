"""`--train` and `--freeze`: what changes, what is saved, and which patterns are refused."""

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_eqx.cli.compose.policy import load_policy, trainable_of
from dpo_eqx.cli.settings.settings import Settings

from .runs import lines_of, same_weights, weights_of
from .small import MODEL, small
from .test_adapters import QUICK

GIVEN = {
    **QUICK,
    "train": (r"feed_forward", r"^norm"),
    "freeze": (r"up\.bias",),
    "steps": 4,
    "save_every": 2,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    with jax.numpy_dtype_promotion("standard"):
        assert small(folder, **GIVEN) == 0
    return folder / "run"


def test_only_the_chosen_parts_change(whole):
    before, after = load_file(MODEL / "model.safetensors"), weights_of(whole)
    assert before.keys() <= after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    chosen = {
        name
        for name in before
        if re.search(r"\.mlp\.|\.ln_2\.|ln_f\.", name) and not name.endswith("mlp.c_fc.bias")
    }
    assert changed == chosen
    assert abs(lines_of(whole)[0]["loss"] - np.log(2)) < 1e-6
    assert abs(lines_of(whole)[-1]["loss"] - np.log(2)) > 1e-4, "the reference does not move"


def test_checkpoints_hold_only_what_is_trained(whole):
    frozen = sum(file.stat().st_size for file in (whole / "checkpoints" / "4").rglob("*"))
    policy = load_policy(Settings(model=str(MODEL), data=("d",), output=whole))
    every = sum(4 * leaf.size for leaf in jax.tree.leaves(policy))
    # Adam has two numbers for each parameter.
    assert frozen < 3 * every


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(whole, tmp_path):
    assert small(tmp_path, **{**GIVEN, "steps": 2}) == 0
    assert small(tmp_path, **GIVEN, resume=True) == 0
    assert same_weights(tmp_path / "run", whole)
    assert [line["loss"] for line in lines_of(tmp_path / "run")] == [
        line["loss"] for line in lines_of(whole)
    ]


def test_without_them_all_is_trained():
    settings = Settings(model=str(MODEL), data=("d",), output=MODEL, freeze=("embedding",))
    policy = load_policy(settings)
    selected = trainable_of(policy, settings)
    assert not selected.embedding.weight
    assert selected.layers.attention.query.weight


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": ("feed_foward",)}, r"`--train` must match .* 'feed_foward', .* Paths near to"),
        ({"freeze": ("x{3}",)}, r"`--freeze` must match .* 'x\{3\}'"),
        ({"train": ("norm",), "freeze": ("norm",)}, "`--train` and `--freeze` must leave at least"),
        ({"train": ("(",)}, r"`--train` must be a regular expression; got '\('"),
        ({"train": ("norm",), "lora_rank": 2}, "`--train` and `--lora-rank` contradict"),
        ({"freeze": ("norm",), "lora": "x"}, "`--freeze` and `--lora` contradict"),
    ],
)
def test_what_is_refused(tmp_path, capsys, given, message):
    assert small(tmp_path, **QUICK, **given) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
