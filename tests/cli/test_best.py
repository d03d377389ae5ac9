"""The best evaluation, the early stop and several held-out sets of a run."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dpo_eqx.cli.run import late_metrics
from dpo_eqx.cli.run.best import Best, in_words, updated
from dpo_eqx.cli.run.checkpoints import Checkpoints
from dpo_eqx.cli.run.inputs import check_same
from dpo_eqx.cli.settings.goal import Goal, goal_of
from dpo_eqx.cli.settings.settings import Settings
from dpo_eqx.cli.settings.sources import HeldOut, held_out_of

from .runs import lines_of, same_weights, weights_of
from .small import MODEL, small, write_data

LOSS = Goal("eval/loss", maximise=False)
ACCURACY = Goal("eval/rewards/accuracies", maximise=True)
NAN, INFINITY = math.nan, math.inf


def followed(goal, values):
    best = Best()
    for step, value in enumerate(values):
        best = updated(best, goal, step, {goal.metric: value, "eval/other": -9.0})
    return best


@pytest.mark.parametrize(
    ("goal", "values", "best"),
    [
        (LOSS, [3.0, 2.0, 2.5], Best(1, 2.0, 3, 1)),
        (ACCURACY, [3.0, 2.0, 2.5], Best(0, 3.0, 3, 2)),
        (LOSS, [2.0, 1.0, 1.0, 1.0], Best(1, 1.0, 4, 2)),
        (ACCURACY, [0.0, 1.0, 1.0, 2.0], Best(3, 2.0, 4, 0)),
        (LOSS, [NAN, 5.0, NAN, -INFINITY, 4.0, 6.0], Best(4, 4.0, 6, 1)),
        (ACCURACY, [INFINITY, 1.0, NAN], Best(1, 1.0, 3, 1)),
        (LOSS, [NAN, INFINITY], Best(None, None, 2, 2)),
        (LOSS, [], Best()),
    ],
)
def test_the_best_of_some_values(goal, values, best):
    assert followed(goal, values) == best
    # Checkpoints hold it as JSON.
    assert Best(**json.loads(json.dumps(vars(best)))) == best


def test_words():
    assert in_words(Best(0, 0.5, 1), LOSS).endswith("the best of 1 evaluation by eval/loss: 0.5")
    assert "model before the first step" in in_words(Best(0, 0.5, 1), LOSS)
    assert "model after step 2" in in_words(Best(2, 0.5, 3), LOSS)
    assert "finite in none of 3 evaluations" in in_words(Best(None, None, 3), LOSS)


@pytest.mark.slow
def test_a_metric_that_the_evaluations_do_not_have_is_known_before_the_run(tmp_path, capsys):
    assert run_on_seen(tmp_path, keep_best="max:new/los", eval_at_start=False) == 2
    error = capsys.readouterr().err
    assert "got new/los. The metrics are new/logps/chosen, new/logps/rejected, new/loss" in error
    assert not (tmp_path / "run").exists()


def settings(tmp_path, **given):
    return Settings(model="m", data=("d",), output=tmp_path, **given)


@pytest.mark.parametrize(
    ("words", "sets", "goal"),
    [
        ("loss", ("a",), LOSS),
        ("eval/loss", (), LOSS),
        ("rewards/accuracies", ("a",), ACCURACY),
        ("max:loss", ("a",), LOSS._replace(maximise=True)),
        ("eval_loss", ("a",), LOSS),
        ("min:eval/logps/chosen", ("a",), Goal("eval/logps/chosen", maximise=False)),
        ("good/rewards/margins", ("good=a",), Goal("eval/good/rewards/margins", maximise=True)),
        ("max:bad/x:y", ("good=a", "bad=b"), Goal("eval/bad/x:y", maximise=True)),
        ("eval/good/loss", ("good=a", "bad=b"), Goal("eval/good/loss", maximise=False)),
        ("eval/loss", ("eval=a", "bad=b"), Goal("eval/eval/loss", maximise=False)),
    ],
)
def test_the_words_of_keep_best(tmp_path, words, sets, goal):
    assert goal_of(settings(tmp_path, keep_best=words, eval_data=sets)) == goal


@pytest.mark.parametrize(
    ("words", "sets", "message"),
    [
        ("logps/rejected", ("a",), "Give `--keep-best min:logps/rejected` or `max:logps/rejected`"),
        ("mean:loss", ("a",), "Give `--keep-best min:mean:loss` or"),
        ("loss", ("good=a", "bad=b"), "got loss. Give a metric such as good/loss or bad/loss"),
        ("rewards/margins", ("good=a",), "got rewards/margins. Give a metric such as good/loss"),
        ("max:good", ("good=a",), "got good. Give"),
    ],
)
def test_words_of_keep_best_that_are_wrong(tmp_path, words, sets, message):
    with pytest.raises(ValueError, match=message):
        goal_of(settings(tmp_path, keep_best=words, eval_data=sets))


def test_the_words_of_eval_data(tmp_path):
    assert held_out_of(()) == []
    assert held_out_of(("a.jsonl",)) == [HeldOut("", "a.jsonl")]
    assert held_out_of(("a/b=c",)) == [HeldOut("", "a/b=c")]
    assert held_out_of(("a=b=c", "b=d")) == [HeldOut("a", "b=c"), HeldOut("b", "d")]
    (tmp_path / "a=b").touch()
    assert held_out_of((f"{tmp_path}/a=b",)) == [HeldOut("", f"{tmp_path}/a=b")]
    for texts, message in (
        (("a=b", "c"), "give each of several sets a name; c has none. Write NAME=c"),
        (("a=b", "a=c"), "its own name; `a` is there twice"),
        (("a=",), "must have a path behind the name, as NAME=a.jsonl; got 'a='"),
    ):
        with pytest.raises(ValueError, match=message):
            held_out_of(texts)


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)

    def kept(step, best):
        checkpoints.save(step, {"x": jax.numpy.full(3, step)}, {}, best=best)
        return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    assert [kept(1, None), kept(2, 2), kept(3, 2), kept(4, 2), kept(5, 2)][2:] == [
        [2, 3],
        [2, 3, 4],
        [2, 4, 5],
    ]
    assert kept(6, 6) == [5, 6]
    assert checkpoints.latest() == 6
    checkpoints.close()


ACCURATE = {
    "keep_best": "seen/rewards/accuracies",
    "early_stop": 2,
    "eval_every": 1,
    "save_every": 3,
    "keep": 1,
    "steps": 8,
    "schedule": "constant",
    "warmup_steps": 0,
}


def run_on_seen(folder, **given):
    """A run whose first set holds rows that it trains on: soon it ranks all of them right."""
    sets = {"seen": write_data(folder / "seen.jsonl", 8), "new": write_data(folder / "new", 5, 1)}
    eval_data = [f"{name}={path}" for name, path in sets.items()]
    return small(folder, **ACCURATE | {"eval_data": eval_data} | given)


def accuracies(run):
    lines = lines_of(run, "eval.jsonl")
    name = "eval/seen/rewards/accuracies"
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that stops early, without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        assert run_on_seen(folder) == 0
    return folder


def test_the_run_stops_early_and_keeps_the_best_checkpoint(whole):
    run = whole / "run"
    found = accuracies(run)
    best = max(found, key=lambda step: found[step])  # the first of equal values
    assert list(found) == list(range(best + 3))
    assert 0 < best < max(found) < ACCURATE["steps"]
    assert found[best] == found[best + 1] == found[best + 2], "ties keep the earlier"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        str(best),
        str(best + 2),
    ]
    facts = json.loads((run / "run.json").read_text())["best"]
    assert (facts["step"], facts["last_step"]) == (best, best + 2)
    assert facts["stopped_early"]
    digests = json.loads((run / "run.json").read_text())["inputs"]
    assert {"--eval-data seen", "tokens of --eval-data new"} <= digests.keys()
    with pytest.raises(ValueError, match="`--eval-data seen` must have the same content"):
        check_same(digests, digests | {"--eval-data seen": "another"}, run)


@pytest.mark.slow
def test_the_model_is_that_of_a_run_of_so_many_steps(whole, tmp_path):
    found = accuracies(whole / "run")
    best = max(found, key=lambda step: found[step])
    plain = {"keep_best": None, "early_stop": None}
    given = {name: value for name, value in ACCURATE.items() if name not in plain}
    assert small(tmp_path, **given | {"steps": best, "eval_every": 0}) == 0
    assert same_weights(whole / "run", tmp_path / "run")


@pytest.mark.slow
def test_a_killed_run_has_the_same_best_and_end(whole, tmp_path, monkeypatch, capsys):
    run, last = tmp_path / "run", max(accuracies(whole / "run"))

    def crash(step, line):
        if step == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(late_metrics, "_check_finite", crash)
        assert run_on_seen(tmp_path) == 130
    # The run goes on after an evaluation without a better value.
    assert max(int(path.name) for path in (run / "checkpoints").iterdir()) == last - 1
    assert run_on_seen(tmp_path, resume=True) == 0
    assert same_weights(run, whole / "run")
    assert lines_of(run, "eval.jsonl") == lines_of(whole / "run", "eval.jsonl")
    best = [json.loads((f / "run.json").read_text())["best"] for f in (run, whole / "run")]
    assert best[0] == best[1]
    assert f"stopped early after step {last}: 2 evaluations" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_stopped_early_goes_on_only_if_it_may(whole, tmp_path):
    run = shutil.copytree(whole / "run", tmp_path / "run")
    last = max(accuracies(run))
    for early_stop, end in ((2, last), (3, last + 1)):
        paths = [f"seen={whole / 'seen.jsonl'}", f"new={whole / 'new'}"]
        given = {"resume": True, "early_stop": early_stop, "eval_data": paths}
        assert run_on_seen(tmp_path, **given, data=whole / "data.jsonl") == 0
        assert max(line["step"] for line in lines_of(run)) == end
        assert same_weights(run, whole / "run")


def set_names(lines):
    return [{name.split("/")[1] for name in line if name != "step"} for line in lines]


def test_several_sets_have_their_own_lines(whole):
    names = set_names(lines_of(whole / "run", "eval.jsonl"))
    assert names == [{"seen"}, {"new"}] * len(accuracies(whole / "run"))


@pytest.mark.slow
def test_a_set_among_several_has_the_numbers_that_it_has_alone(whole, tmp_path, capsys):
    lines = lines_of(whole / "run", "eval.jsonl")
    names = set_names(lines)
    # Alone and without a name, a set has the same numbers, and none before the first step.
    alone = {"eval_data": whole / "new", "eval_every": 2, "eval_at_start": False, "steps": 2}
    given = {**ACCURATE, **alone, "keep_best": None, "early_stop": None}
    assert small(tmp_path, **{n: v for n, v in given.items() if v is not None}) == 0
    (line,) = lines_of(tmp_path / "run", "eval.jsonl")
    assert line["step"] == 2
    (same,) = [x for x, n in zip(lines, names, strict=True) if n == {"new"} and x["step"] == 2]
    assert {n.replace("eval/new/", "eval/"): x for n, x in same.items()} == line
    assert f"eval, step 2: loss {line['eval/loss']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_model_before_the_first_step_may_be_the_best(tmp_path, capsys):
    """The other rows are ranked worse and worse; adapters and a moving reference change nothing."""
    given = {"keep_best": "new/loss", "early_stop": 1, "report": True}
    for name, more in (
        ("whole", {"sync_reference_every": 1}),
        ("adapters", {"lora_rank": 2}),
    ):
        assert run_on_seen(tmp_path, **given, **more, output=tmp_path / name) == 0
        assert "is the model before the first step, the best of 2 evaluations by eval/new/loss" in (
            capsys.readouterr().out
        )
        before = load_file(MODEL / "model.safetensors")
        after = weights_of(tmp_path / name)
        assert all(np.array_equal(after[tensor], before[tensor]) for tensor in before)
        page = (tmp_path / name / "report.html").read_text()
        assert "model/ is the model before the first step" in page
        assert "The run stopped early after step 1: 1 evaluation without a better eval/new" in page
        probe = json.loads((tmp_path / name / "report" / "after.json").read_text())
        assert probe["data"] == "held-out seen"
        assert np.abs(probe["margin"]).max() < 1e-5
        assert "<td>held out new, step 1</td>" in page
