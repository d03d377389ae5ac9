"""Kinds of adapters in `dpo-eqx train`: what each flag does, and that resuming changes no bit."""

import json
import re

import jax
import numpy as np
import pytest

from dpo_eqx import models

from .runs import lines_of, same_weights
from .small import MODEL, small
from .test_adapters import QUICK

KINDS = {
    "lora_rslora": True,
    "lora_dropout": 0.5,
    "lora_dora": True,
    "lora_modules_to_save": "^(positions|norm)",
}
GIVEN = {**QUICK, "lora_rank": 4, "lora_alpha": 2.0, "steps": 4, "save_every": 2}


def logged(output):
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines_of(output)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with adapters of no special kind."""
    folder = tmp_path_factory.mktemp("plain")
    with jax.numpy_dtype_promotion("standard"):
        assert small(folder, **GIVEN) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of all kinds at once, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        assert small(folder, **GIVEN, **KINDS) == 0
    return folder / "run"


@pytest.mark.slow
def test_kinds_are_in_the_file_and_the_first_loss_is_log_2(whole):
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert config["use_rslora"]
    assert config["lora_dropout"] == 0.5
    assert config["use_dora"]
    assert config["modules_to_save"] == ["ln_f", "wpe"]
    assert config["r"] == 4
    assert config["lora_alpha"] == 2
    # Queries, keys and values of rank 4 are one adapter of rank 12, with the same scale.
    assert abs(config["alpha_pattern"]["c_attn"] - 2 * 3**0.5) < 1e-9
    assert abs(lines_of(whole)[0]["loss"] - np.log(2)) < 1e-6


def test_the_adapter_and_the_model_are_the_same_policy(whole):
    policy = models.load_lora(models.load(MODEL), whole / "adapter")
    model = models.load(whole / "model")
    for layer in ("query", "value"):
        ours = getattr(models.merge_lora(policy).layers.attention, layer).weight
        assert np.abs(ours - getattr(model.layers.attention, layer).weight).max() < 1e-6
    for ours, theirs in ((policy.positions, model.positions), (policy.norm, model.norm)):
        assert np.array_equal(ours.weight, theirs.weight)
        assert not np.array_equal(ours.weight, ours.original.weight)
    change = policy.layers.attention.query.magnitude.change
    assert np.abs(change).max() > 1e-4


@pytest.mark.slow
def test_a_resumed_run_has_the_same_bits(whole, tmp_path):
    given = {**GIVEN, **KINDS}
    assert small(tmp_path, **{**given, "steps": 2}) == 0
    assert small(tmp_path, **given, resume=True) == 0
    assert same_weights(tmp_path / "run", whole)
    assert logged(tmp_path / "run") == logged(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_learns_something_else(kind, plain, tmp_path):
    assert small(tmp_path, **GIVEN, **{kind: KINDS[kind]}) == 0
    assert abs(lines_of(tmp_path / "run")[-1]["loss"] - lines_of(plain)[-1]["loss"]) > 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_rslora": True}, "`--lora-rslora` is for adapters, .* give `--lora-rank` too"),
        ({"lora_dropout": 0.1}, "`--lora-dropout` is for adapters, .* `--lora-rank` or `--lora`"),
        ({"lora_dora": True}, "`--lora-dora` is for adapters, .* give `--lora-rank` too"),
        ({"lora": "x", "lora_rslora": True}, "`--lora` and `--lora-rslora` contradict"),
        ({"lora_modules_to_save": "norm"}, "`--lora-modules-to-save` is for adapters"),
        ({"lora_rank": 2, "lora_modules_to_save": "("}, "`--lora-modules-to-save` must be a reg"),
        ({"lora_rank": 2, "lora_modules_to_save": "x"}, "`--lora-modules-to-save` must match the"),
        ({"lora": "x", "lora_dora": True}, "`--lora` and `--lora-dora` contradict"),
        ({"lora_rank": 2, "lora_dropout": 1.0}, r"`--lora-dropout` must be in \[0, 1\); got 1.0"),
    ],
)
def test_what_does_not_go_together(tmp_path, capsys, given, message):
    assert small(tmp_path, **QUICK, **given) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
