"""Columns of numbers that a loss or a run cannot take are named before there is a run folder."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from dpo_eqx._arrays.log_probs import UnpairedLogProbs
from dpo_eqx._arrays.loss_values import UnpairedLoss
from dpo_eqx._training.metrics import default_metrics, weighted_sums
from dpo_eqx.cli.compose.data import prepare
from dpo_eqx.cli.compose.loss import compose_loss, needs_mismatched
from dpo_eqx.cli.report.curves import draw_log_probs
from dpo_eqx.cli.report.read import Record
from dpo_eqx.cli.run.evaluations import evaluate_all
from dpo_eqx.cli.run.late_metrics import without_sides
from dpo_eqx.cli.run.state import State
from dpo_eqx.cli.settings.settings import Settings

from .runs import lines_of
from .small import small

PAIR = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [4]}
ONE = {"prompt_ids": [1], "completion_ids": [2, 3], "label": True}
BOTH = {"reference_chosen": -1.0, "reference_rejected": -2.0}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


BAD = {
    "a beta that the loss lacks": (
        [PAIR | {"beta": 0.1}],
        None,
        {"loss": ("sft",)},
        "`--loss sft` has no `beta`, and {data} has a column `beta`. Leave the column out with "
        "`--columns beta=`",
    ),
    "one side of a reference": (
        [PAIR | {"reference_chosen": -1.0}],
        None,
        {},
        "{data} must have `reference_chosen`, `reference_rejected` if it has log-probabilities of "
        "the reference; it has `reference_chosen` alone.",
    ),
    "a reference of training data alone": (
        [PAIR | BOTH],
        [PAIR],
        {},
        "{data} has `reference_chosen`, `reference_rejected`, and {held_out} does not. Add them "
        "there, or leave them out with `--columns reference_chosen= reference_rejected=`.",
    ),
    "a reference of held-out data alone": (
        [PAIR],
        [PAIR | BOTH],
        {},
        "{held_out} has `reference_chosen`, `reference_rejected`, and {data} does not.",
    ),
    "a beta of training data alone": (
        [PAIR | {"beta": 0.2}],
        [PAIR],
        {},
        "{data} has `beta`, and {held_out} does not.",
    ),
    "an empty prompt": (
        [PAIR, {"prompt_ids": [], "chosen_ids": [3, 4], "rejected_ids": [5, 6]}],
        None,
        {},
        "`prompt_ids` must hold a token in line 2 of {data}, since its completions",
    ),
    "one prompt": (
        [ONE, ONE],
        None,
        {"loss": ("kto",)},
        "all 2 rows of {data} have one prompt. Add prompts, or take `--loss bco`",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_trained_is_named_before_the_run(case, tmp_path, capsys):
    rows, held_out, settings, message = BAD[case]
    paths = {"data": write(tmp_path / "data.jsonl", *rows), "held_out": tmp_path / "eval.jsonl"}
    if held_out:
        settings = settings | {"eval_data": write(paths["held_out"], *held_out)}
    assert small(tmp_path, **settings) == 2
    error = capsys.readouterr().err
    assert message.format(**paths) in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "needed"),
    [(["kto"], True), (["bco"], False), (["apo_zero_unpaired"], False), (["kto", "bco"], True)],
)
def test_only_kto_needs_mismatched_completions(names, needed):
    settings = Settings(model="", data=("",), output=Path(), loss=tuple(names))
    assert needs_mismatched(compose_loss(settings)) == needed


@pytest.mark.slow
def test_the_mean_over_no_completion_is_left_out(tmp_path):
    """Batches of one row: each has one label alone. All rows have one prompt, too."""
    write(tmp_path / "data.jsonl", ONE, ONE | {"label": False})
    settings = {"batch_size": 1, "steps": 2, "shuffle": False, "dropout": False}
    assert small(tmp_path, loss=("apo_zero_unpaired",), **settings) == 0
    lines = lines_of(tmp_path / "run")
    for line, side in zip(lines, ("chosen", "rejected"), strict=True):
        assert {n for n in line if "/" in n} == {f"rewards/{side}", f"logps/{side}"}
        assert line[f"logps/{side}"] < 0


def test_an_evaluation_leaves_out_a_side_that_is_not_held_out(tmp_path):
    path = write(tmp_path / "eval.jsonl", ONE, ONE)
    settings = Settings(model="", data=("",), output=Path(), batch_size=2)
    held_out = dataclasses.replace(prepare(str(path), settings, 9), mismatched=False)

    def evaluate(policy, batch, reference):
        log_probs = UnpairedLogProbs(jnp.full(2, -3.0), batch.label)
        values = default_metrics(log_probs, None, UnpairedLoss(jnp.ones(2), jnp.ones(2)))
        return weighted_sums(values, jnp.asarray(batch.weight))

    state = State(None, None, None, jax.random.key(0))
    got = evaluate_all(evaluate, held_out, settings, None, state)
    assert got == {"eval/loss": 1, "eval/rewards/chosen": 1, "eval/logps/chosen": -3}


def test_margins_need_both_sides():
    line = {"loss": 0.5, "rewards/chosen": 1.0, "rewards/rejected": 0.0, "rewards/margins": 1.0}
    assert without_sides(line, ["rejected"]) == {"loss": 0.5, "rewards/chosen": 1.0}
    assert without_sides(line, []) == line


def test_curves_skip_a_step_without_the_metric():
    axes = Figure().subplots()
    empty = {"settings": {}, "facts": {}, "evaluations": {}}
    columns = {"step": np.arange(4.0), "logps/chosen": np.array([1, np.nan, np.nan, 2.0])}
    paths = {"name": "run", "path": Path(), "before": None, "after": None, "remarks": []}
    record = Record(metrics=columns, **paths, **empty)
    draw_log_probs(axes, [record])
    (curve,) = axes.get_lines()
    np.testing.assert_array_equal(curve.get_xydata(), [[0, 1], [3, 2]])
