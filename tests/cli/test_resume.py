"""A run that was interrupted and goes on ends with the very bits of one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from dpo_eqx import losses
from dpo_eqx.cli.compose.preferences import prepare_all
from dpo_eqx.cli.run import checkpoints, inputs
from dpo_eqx.cli.run.folder import Folder
from dpo_eqx.cli.run.inputs import check_same, digest_weights, digests_of
from dpo_eqx.cli.settings.settings import Settings

from .interrupted import at_line, steady, terminate
from .runs import lines_of, same_weights
from .small import MODEL, STEPS, check_each_step_once, small, write_data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        assert small(folder, eval_data=write_data(folder / "eval.jsonl", 5, 1)) == 0
    return folder / "run"


def go_on(folder, whole):
    """Resumes the run in `folder`, and compares all that it left with `whole`."""
    assert small(folder, eval_data=folder / "eval.jsonl", resume=True) == 0
    assert same_weights(folder / "run", whole)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert steady(folder / "run", name) == steady(whole, name)
    check_each_step_once(folder / "run")


@pytest.mark.slow
def test_sigterm_saves_and_exits(tmp_path, whole, monkeypatch, capsys):
    write_data(tmp_path / "eval.jsonl", 5, 1)
    with monkeypatch.context() as patch:
        at_line(patch, 3, terminate)
        assert small(tmp_path, eval_data=tmp_path / "eval.jsonl") == 0
    steps = len(lines_of(tmp_path / "run"))
    # The line may be that of the step before the one that runs.
    assert steps in (3, 4)
    out = capsys.readouterr().out
    assert f"stopped by SIGTERM after step {steps}; continue with --resume" in out
    assert (tmp_path / "run" / "checkpoints" / str(steps)).exists()
    assert not (tmp_path / "run" / "model").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    go_on(tmp_path, whole)


def test_a_crash_after_a_checkpoint(tmp_path, whole, monkeypatch):
    def crash():
        raise KeyboardInterrupt

    write_data(tmp_path / "eval.jsonl", 5, 1)
    with monkeypatch.context() as patch:
        at_line(patch, 5, crash)
        assert small(tmp_path, eval_data=tmp_path / "eval.jsonl") == 130
    run = tmp_path / "run"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "los')  # a line half written
    assert [line["step"] for line in json_lines(run)] == [1, 2, 3, 4, 5]
    go_on(tmp_path, whole)
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4]


def json_lines(run):
    whole_lines = (run / "metrics.jsonl").read_text().splitlines()[:-1]
    return [json.loads(line) for line in whole_lines]


@pytest.mark.slow
def test_a_crash_before_the_first_checkpoint(tmp_path, whole, monkeypatch):
    def crash():
        raise KeyboardInterrupt

    write_data(tmp_path / "eval.jsonl", 5, 1)
    with monkeypatch.context() as patch:
        at_line(patch, 1, crash)
        assert small(tmp_path, eval_data=tmp_path / "eval.jsonl") == 130
    go_on(tmp_path, whole)


@pytest.mark.slow
def test_a_full_disk(tmp_path, whole, compiled):
    write_data(tmp_path / "eval.jsonl", 5, 1)
    same_bits = {"JAX_ENABLE_X64": "1", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.cli.full_disk", tmp_path],
        env={**os.environ, **same_bits},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr
    assert "The checkpoint of step 4 could not be written to" in run.stderr
    assert "The checkpoint of step 2 is complete" in run.stderr
    assert "Traceback" not in run.stderr
    go_on(tmp_path, whole)


def test_a_full_disk_is_told_of_once_even_if_threads_come_late():
    told = []
    hook = checkpoints._but_for_closed_loops(told.append)
    late, other = (
        types.SimpleNamespace(exc_value=RuntimeError(words))
        for words in ("Event loop is closed", "something else")
    )
    hook(late)
    hook(other)
    assert told == [other]


@pytest.mark.slow
def test_finished_and_extended(tmp_path, whole, capsys):
    write_data(tmp_path / "eval.jsonl", 5, 1)
    folder = {"eval_data": tmp_path / "eval.jsonl", "schedule": "constant"}
    assert small(tmp_path, **folder) == 0
    assert small(tmp_path, **folder, resume=True) == 0
    check_each_step_once(tmp_path / "run")
    assert small(tmp_path, **folder | {"steps": STEPS + 2}, resume=True) == 0
    check_each_step_once(tmp_path / "run", STEPS + 2)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints"), key=int) == ["6", "8"]


def test_another_run_is_not_continued(tmp_path, whole, capsys):
    write_data(tmp_path / "eval.jsonl", 5, 1)
    model = shutil.copytree(MODEL, tmp_path / "model")
    with pytest.MonkeyPatch.context() as patch:
        at_line(patch, 3, terminate)
        assert small(tmp_path, model=model) == 0
    before = snapshot(tmp_path / "run")
    assert small(tmp_path, model=model) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert small(tmp_path, model=model, resume=True, beta=0.2, loss=["ipo", "sft"]) == 2
    changed = "`--loss` was sigmoid, is ipo sft; `--beta` was not given, is 0.2. Give the same"
    assert changed in capsys.readouterr().err
    change_last_byte(model / "model.safetensors")
    assert small(tmp_path, model=model, resume=True) == 2
    assert "The weights of `--model` are others than when the run" in capsys.readouterr().err
    write_data(tmp_path / "data.jsonl", seed=3)
    assert small(tmp_path, model=model, resume=True) == 2
    assert "started; it has changed. Give the same file" in capsys.readouterr().err
    assert snapshot(tmp_path / "run") == before


def test_a_start_without_a_step_does_not_take_the_folder(tmp_path):
    """A run of other settings replaces what the start wrote, but nothing of a run with a step."""
    folder = Folder(tmp_path / "run")
    first, second = (
        Settings(model="m", data=("d",), output=folder.path, beta=beta) for beta in (0.1, 0.2)
    )
    folder.check(first)
    folder.begin(first, {}, 0)
    for path in (folder.evaluations, folder.samples, folder.metrics):
        path.write_text("")
    folder.evaluations.write_text('{"step": 0}\n')
    folder.check(second)
    folder.begin(second, {}, 0)
    assert "beta: 0.2" in folder.config.read_text()
    assert len(folder.starts()) == 1
    assert not folder.evaluations.exists()
    later = [folder.checkpoints, folder.model, folder.adapter, folder.page, folder.metrics]
    for path in later:
        path.write_text('{"step": 1}\n')
        for refused in (folder.check, lambda settings: folder.begin(settings, {}, 0)):
            with pytest.raises(ValueError, match="holds a run already"):
                refused(second)
        path.unlink()
    folder.run.unlink()
    with pytest.raises(ValueError, match=r"holds a run already \(config.yaml\)"):
        folder.check(second)


def change_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def pairs(path, answer):
    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    texts = {"prompt": "Why?", "chosen": answer, "rejected": "No."}
    record = {name: [{"role": turns[name], "content": texts[name]}] for name in turns}
    path.write_text(json.dumps(record))
    return path


def test_every_input_of_a_run_is_remembered(models, tmp_path):
    """Held-out data, weights, and a chat template that changes without a change of length."""
    model = shutil.copytree(models("qwen3"), tmp_path / "model")
    reference = shutil.copytree(models("qwen3"), tmp_path / "reference")
    held_out = pairs(tmp_path / "eval.jsonl", "So.")
    settings = Settings(
        model=str(model),
        data=(str(pairs(tmp_path / "data.jsonl", "Yes.")),),
        eval_data=(str(held_out),),
        reference=str(reference),
        output=tmp_path,
    )

    def digests():
        return digests_of(settings, prepare_all(settings, losses.dpo))

    def refused(change):
        before = digests()
        check_same(before, digests(), tmp_path)
        change()
        with pytest.raises(ValueError, match=r"run in .* started") as error:
            check_same(before, digests(), tmp_path)
        return str(error.value)

    def in_template(old, new):
        template = model / "chat_template.jinja"
        text = template.read_text()
        assert old in text
        template.write_text(text.replace(old, new))

    assert "`--eval-data` must have the same" in refused(lambda: pairs(held_out, "Oh."))
    assert "weights of `--model`" in refused(lambda: change_last_byte(model / "model.safetensors"))
    changed = refused(lambda: change_last_byte(reference / "model.safetensors"))
    assert "weights of `--reference`" in changed
    changed = refused(lambda: in_template("<|im_end|>", "<|im_endd>"))
    assert "The tokens of `--data` are others" in changed
    assert "today's date" in changed
    # A run of an earlier version remembers its data alone.
    check_same({"--data": digests()["--data"]}, digests(), tmp_path)


def test_large_weights_are_sampled_over_their_whole_length(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_WHOLE", 0)
    path = tmp_path / "model.safetensors"
    content = np.random.default_rng(0).bytes(2**21)
    seen = set()
    for changed in (None, 0, 2**20, 2**21 - 1):
        altered = bytearray(content)
        if changed is not None:
            altered[changed] ^= 1
        path.write_bytes(altered)
        seen.add(digest_weights(tmp_path))
    assert len(seen) == 4


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops(tmp_path, capsys):
    assert small(tmp_path, learning_rate=1e30, schedule="constant", warmup_steps=0) == 2
    error = capsys.readouterr().err
    assert "not finite at step 2" in error
    assert "another `--output`" in error
    assert lines_of(tmp_path / "run")[-1]["step"] == 2
    assert not np.isnan([line["loss"] or 0 for line in lines_of(tmp_path / "run")]).any()
