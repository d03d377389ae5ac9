"""The report: of runs of any length, of several, of a killed one; and what train keeps for it."""

import json
import math
import re
import shutil
import time

import numpy as np
import pytest

from dpo_eqx.cli.report import probe as report_probe
from dpo_eqx.cli.report.curves import envelope
from dpo_eqx.cli.report.page import number
from dpo_eqx.cli.report.pairs import correlation, wilson
from dpo_eqx.cli.report.probe import PAIRS, spread
from dpo_eqx.cli.report.read import read_lines, read_record

from ..sharding.processes import Processes
from .commands import one_message, run
from .runs import train
from .small import STEPS, small, write_data

CURVES = ["Loss", "Accuracy", "Margin", "Rewards", "Log-probabilities", "Gradient norm"]
PANELS = [*CURVES, "Margins of the same pairs", "Calibration", "Length and margin"]


def written(folder, steps, *, after=True, **changes):
    """A folder as a run of so many steps leaves it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(steps)
    line = {"loss": 0.6931, "rewards/accuracies": 0.5, "rewards/margins": 0.0}
    line |= {"rewards/chosen": -0.1, "rewards/rejected": -0.1, "logps/chosen": -90.0}
    line |= {"logps/rejected": -95.0, "grad_norm": 1.5}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            noisy = {n: v + (rng.normal() if step > 1 else 0) for n, v in line.items()}
            file.write(json.dumps({"step": step, **noisy}) + "\n")
    (folder / "config.yaml").write_text("model: here\nbeta: 0.3\nsteps: null\n")
    (folder / "run.json").write_text(json.dumps({"data": {"counts": {"chosen_cut": 3}}} | changes))
    (folder / "report").mkdir()
    probe = {"step": 0, "data": "held-out", "margin": [0.0] * 9, "samples": []}
    (folder / "report" / "before.json").write_text(json.dumps(probe))
    if after:
        (folder / "model").mkdir()
        sample = {"prompt": "Why <b>?", "text": " So & so.", "tokens": 3, "ended": True}
        probe |= {"margin": rng.normal(0.5, 1, 9).tolist(), "samples": [sample]}
        probe |= {"chosen_tokens": [*range(9)], "rejected_tokens": [4] * 9}
        (folder / "report" / "after.json").write_text(json.dumps(probe))
    return folder


def report(capsys, *arguments):
    return run(capsys, "report", *arguments)


def titles(page):
    return re.findall(r"<figure><h3>(.*?)</h3>", page)


def check_alone(page):
    """Nothing is fetched, and no two elements have one name."""
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "<script" not in page
    assert "@import" not in page
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "steps", [pytest.param(n, marks=pytest.mark.slow) if n != 1 else n for n in (1, 20, 150)]
)
def test_a_run_of_any_length(steps, tmp_path, capsys):
    folder = written(tmp_path / "run", steps)
    status, out, err = report(capsys, folder)
    assert (status, err) == (0, "")
    assert out == f"report: {folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    check_alone(page)
    assert titles(page) == PANELS
    assert f"training, step {steps}" in page
    assert page.count("training, step 1<") == 1
    assert ("the band around it" in page) == (steps == 150)
    assert "cut: chosen completion cut" in page
    assert "No record was dropped." in page
    assert "Why &lt;b&gt;?" in page
    assert "So &amp; so." in page
    assert "<td>beta</td><td>0.3</td>" in page.split("<details>")[0]
    assert "<td>steps</td><td>null</td>" in page.split("<details>")[1]
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow  # writes and reads 36 MB
def test_a_run_of_100000_steps(tmp_path, capsys):
    folder = written(tmp_path / "run", 100_000)
    began = time.process_time()
    assert report(capsys, folder)[0] == 0
    assert time.process_time() - began < 10
    assert (folder / "report.html").stat().st_size < 1e6


@pytest.mark.slow
def test_several_runs(tmp_path, capsys, monkeypatch):
    folders = [written(tmp_path / "a", 3), written(tmp_path / "b", 5)]
    monkeypatch.chdir(tmp_path)
    assert report(capsys, *folders)[0] == 0
    page = (tmp_path / "report.html").read_text()
    check_alone(page)
    assert titles(page) == PANELS
    assert "a: training, step 3" in page
    assert "b: training, step 5" in page
    assert "a: 9 pairs of the held-out data. b: 9 pairs of the held-out data." in page
    assert "<h2>Samples: a</h2>" in page
    assert "<td>cut: chosen completion cut, keeping its start, its EOS lost</td><td>3</td>" in page
    shutil.copytree(folders[0], tmp_path / "deep" / "a")
    assert report(capsys, folders[0], tmp_path / "deep" / "a", "--into", folders[1])[0] == 0
    assert f"{tmp_path / 'deep' / 'a'}: training" in (folders[1] / "report.html").read_text()


def test_what_a_killed_run_left(tmp_path, capsys):
    folder = written(tmp_path / "run", 7, after=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    status, out, err = report(capsys, folder)
    assert (status, err) == (0, "")
    remarks = [
        "The last line of metrics.jsonl cannot be read and is left out.",
        "The run has not come to its end: no model yet, last step 7.",
    ]
    page = (folder / "report.html").read_text()
    for remark in remarks:
        assert f"<li>{remark}</li>" in page
        assert f"run: {remark}" in out
    assert titles(page) == CURVES


KINDS = {
    "supervised": (
        {"loss": 2.0, "grad_norm": 1.0, "logps/chosen": -9.0, "mean_token_accuracy": 0.5},
        ["Loss", "Log-probabilities", "Gradient norm", "Token accuracy"],
    ),
    "online": (
        {"loss": 0.7, "grad_norm": 1.0, "reward": 0.1, "reward_best": 0.3, "kl": 0.2, "length": 9},
        ["Loss", "Gradient norm", "Reward of samples", "KL to the reference", "Length of samples"],
    ),
    "entropy": ({"loss": 0.7, "entropy": 2.0}, ["Loss", "Gradient norm", "Entropy"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_has_the_panels_of_its_metrics(kind, tmp_path, capsys):
    line, panels = KINDS[kind]
    folder = written(tmp_path / "run", 2, after=False)
    lines = [json.dumps({"step": step, **line}) + "\n" for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert report(capsys, folder)[0] == 0
    page = (folder / "report.html").read_text()
    assert titles(page) == panels
    check_alone(page)


def test_before_the_first_step_and_all_files_broken(tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "report").mkdir(parents=True)
    for name in ("config.yaml", "run.json", "report/before.json"):
        (folder / name).write_text("{")
    assert report(capsys, folder)[0] == 0
    page = (folder / "report.html").read_text()
    for name in ("config.yaml", "run.json", "before.json"):
        assert f"{name} cannot be read and is left out." in page
    assert "No step has been logged yet." in page


def test_lines_that_are_broken_are_left_out_and_said(tmp_path):
    path, remarks = tmp_path / "metrics.jsonl", []
    path.write_bytes(b'{"step": 2, "a": 1}\n\xff\n[]\n{"step": 1, "a": null, "b": 3}\n')
    columns = read_lines(path, remarks)
    assert columns["step"].tolist() == [1, 2]
    np.testing.assert_array_equal(columns["a"], [np.nan, 1])
    np.testing.assert_array_equal(columns["b"], [3, np.nan])
    assert remarks == ["2 of 4 lines of metrics.jsonl cannot be read and is left out."]


def test_an_envelope_hides_no_step():
    rng = np.random.default_rng(0)
    step, value = np.arange(1.0, 1001), rng.normal(size=1000)
    value[345], value[7] = 50, np.nan
    curve = envelope(step, value, 60)
    assert len(curve.step) == 60
    assert curve.high.max() == 50
    there = np.isfinite(value)
    for s, v in zip(step[there], value[there], strict=True):
        near = np.abs(curve.step - s).argmin()
        around = slice(max(0, near - 1), near + 2)
        assert curve.low[around].min() <= v <= curve.high[around].max()
    np.testing.assert_allclose(curve.mean.mean(), value[there].mean(), atol=0.02)
    assert envelope(step[:5], np.full(5, np.nan)).step.size == 0


def test_numbers_on_the_page():
    assert number(-1.1e-6) == "0"
    assert [number(x) for x in (0.00123456, -1234.56, 0.5)] == ["0.001235", "-1,235", "0.5"]
    assert number(math.nan) == "\N{EN DASH}"


def test_numbers_in_pictures():
    # Wilson 1927, as computed by hand: 8 of 10.
    low, high = wilson(np.array([0.8]), np.array([10]))
    np.testing.assert_allclose([low[0], high[0]], [0.4902, 0.9433], atol=1e-4)
    assert correlation(np.array([1.0, 2, 3]), np.array([1.0, 2, 4])) == "+0.98"
    assert correlation(np.ones(3), np.arange(3.0)) == "\N{EN DASH}"
    assert spread(3, PAIRS).tolist() == [0, 1, 2]
    many = spread(10_000, PAIRS)
    assert (len(many), many[0], many[-1]) == (PAIRS, 0, 9999)


BAD = {
    "no folder": (["nowhere"], "there is no folder nowhere"),
    "no run": (["."], "has none of metrics.jsonl, run.json, config.yaml"),
    "no folder to write to": (["run", "--into", "no"], "`--into` must be a folder that exists"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    flags, words = BAD[case]
    status, _, err = report(capsys, *flags)
    one_message(status, err, "report", words)


@pytest.mark.slow
def test_train_keeps_what_the_report_needs(tmp_path, capsys):
    """Margins before are 0 where policy and reference are one; after they are those of `eval`."""
    held_out = write_data(tmp_path / "eval.jsonl", 5, 1)
    assert small(tmp_path, report=True, eval_data=held_out, dropout=False) == 0
    record = read_record(tmp_path / "run")
    assert record.remarks == []
    assert (record.before["step"], record.after["step"]) == (0, STEPS)
    assert record.after["data"] == "held-out"
    np.testing.assert_allclose(record.before["margin"], np.zeros(5), atol=1e-5)
    last = record.evaluations["eval/rewards/margins"][-1]
    np.testing.assert_allclose(np.mean(record.after["margin"]), last, rtol=1e-3, atol=1e-5)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    assert record.after["chosen_tokens"] == [len(row["chosen_ids"]) for row in rows]
    assert "report: " in capsys.readouterr().out
    assert titles((tmp_path / "run" / "report.html").read_text()) == PANELS


@pytest.mark.slow
def test_two_processes_keep_the_pairs_that_one_keeps(tmp_path):
    """The last of their batches is ragged."""
    settings = {"report": True, "steps": 3, "eval_data": write_data(tmp_path / "eval.jsonl", 21, 1)}
    probes = []
    for count, mesh in ((1, {}), (2, {"mesh": "data=2,fsdp=2"})):
        with Processes(tmp_path, count, name=f"run{count}", **mesh, **settings) as processes:
            probes.append(read_record(processes.finish()).after)
    one, two = probes
    np.testing.assert_allclose(two["margin"], one["margin"], rtol=1e-3, atol=1e-4)
    assert two["chosen_tokens"] == one["chosen_tokens"]
    assert len(two["margin"]) == 21
    assert (len(one["samples"]), two["samples"]) == (4, [])
    assert "several processes" in (tmp_path / "run2" / "report.html").read_text()


@pytest.mark.slow
def test_samples_of_text_and_single_completions(models, tmp_path):
    record = {"prompt": "Why?", "completion": " So.", "label": True}
    lines = [record, record | {"completion": " No.", "label": False}, record | {"prompt": "How?"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status = train(
        model=models("llama"),
        data=tmp_path / "data.jsonl",
        output=tmp_path / "run",
        loss="kto",
        steps=2,
        batch_size=2,
        report=True,
    )
    assert status == 0
    after = read_record(tmp_path / "run").after
    assert [s["prompt"] for s in after["samples"]] == ["Why?", "Why?", "How?"]
    assert after["data"] == "training"
    assert "margin" not in after
    # KTO has no pairs whose order could be right, and no step had answers of both labels.
    panels = [name for name in CURVES if name not in ("Accuracy", "Margin")]
    assert titles((tmp_path / "run" / "report.html").read_text()) == panels


@pytest.mark.slow
def test_learned_positions_that_are_too_few_for_samples_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(report_probe, "TOKENS", 10_000)
    assert small(tmp_path, report=True, steps=1) == 0
    after = json.loads((tmp_path / "run" / "report" / "after.json").read_text())
    assert after["samples"] == []
    assert "learned positions" in after["no_samples"]
    assert "learned positions" in (tmp_path / "run" / "report.html").read_text()
