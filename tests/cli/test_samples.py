"""Answers to some prompts while a run learns: which prompts, which answers, and where they go."""

import json

import jax
import numpy as np
import pytest

from dpo_eqx import models as library
from dpo_eqx.cli.compose.data import prepare
from dpo_eqx.cli.compose.sample_prompts import FROM_FILE, sample_prompts
from dpo_eqx.cli.run import late_metrics
from dpo_eqx.cli.settings.settings import Settings
from dpo_eqx.cli.terminal.answers import padded
from dpo_eqx.cli.terminal.samples import sampled

from ..sharding.processes import Processes, deviation
from .interrupted import steady
from .runs import lines_of, same_weights
from .small import MODEL, small, write_data
from .test_report import report, written

PROMPTS = [[5, 6, 7], [9] * 20]
SAMPLING = {"sample_every": 2, "sample_tokens": 5}
SHORT = {"steps": 4, "save_every": 3}
EOS = 2  # of the checkpoint


def write_prompts(path, prompts=PROMPTS):
    path.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in prompts))
    return path


def as_text(ids):
    return " ".join(map(str, ids))


def answers(policy, tokens, seed):
    """Of a policy, by the library alone."""
    rows = padded(PROMPTS, 32)
    options = {"samples": 1, "max_new_tokens": tokens, "key": jax.random.key(seed), "eos": EOS}
    drawn = library.sample(policy, rows, **options).tokens
    pairs = zip(np.asarray(drawn.ids), np.asarray(drawn.mask), strict=True)
    return [as_text(x for x in ids[0][mask[0]] if x != EOS) for ids, mask in pairs]


@pytest.mark.slow
def test_a_killed_run_answers_each_prompt_once_and_learns_as_without(tmp_path, monkeypatch, capsys):
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert small(tmp_path, **SHORT, output=plain) == 0
    given = {**SHORT, **SAMPLING, "sample_prompts": write_prompts(tmp_path / "prompts.jsonl")}
    traces, draw = [], library.sample

    def counted(*arguments, **options):
        traces.append(1)
        return draw(*arguments, **options)

    def crash(step, line):
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(library, "sample", counted)
        patch.setattr(late_metrics, "_check_finite", crash)
        assert small(tmp_path, **given) == 130
    assert len(traces) == 1, "one program for the policy and the reference at every step"
    assert [line["step"] for line in lines_of(run, "samples.jsonl")] == [2, 2]
    # As if the process had been killed between these lines and the next checkpoint.
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt": "5 6 7", "answer": "1"}\n')
    assert small(tmp_path, **given, resume=True) == 0
    assert steady(run) == steady(plain)
    assert same_weights(run, plain)

    lines = lines_of(run, "samples.jsonl")
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    assert [line["prompt"] for line in lines] == [as_text(ids) for ids in PROMPTS] * 2
    before, after = (answers(library.load(path), 5, 7) for path in (MODEL, run / "model"))
    assert [line["reference"] for line in lines] == before * 2
    assert [line["answer"] for line in lines[2:]] == after
    assert before != after
    out = capsys.readouterr().out
    assert "answers after step 4" in out
    assert after[0].split()[0] in out


def test_prompts_come_from_the_held_out_data_or_from_the_file(tmp_path):
    record = {"chosen_ids": [1], "rejected_ids": [2]}
    rows = [record | {"prompt_ids": ids} for ids in ([3], [3], [4, 5], [6], [7], [8])]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("Why?\nHow?\n")

    def found(**given):
        settings = Settings(
            model=str(MODEL), data=(str(path),), output=tmp_path, sample_every=1, **given
        )
        training = prepare(str(write_data(tmp_path / "other.jsonl")), settings, 96)
        return sample_prompts(settings, [training, prepare(str(path), settings, 96)])

    assert found().encoded.ids == [[3], [4, 5], [6], [7]], "each prompt once"
    prompts = str(write_prompts(tmp_path / "prompts.jsonl"))
    assert found(sample_prompts=prompts).encoded.ids == PROMPTS
    assert found(sample_prompts=prompts, max_prompt_length=2).encoded.ids == [[6, 7], [9, 9]]
    many = str(write_prompts(tmp_path / "many.jsonl", [[1]] * (FROM_FILE + 1)))
    for given, message in (
        ({"sample_prompts": many}, f"at most {FROM_FILE} prompts, .*many.jsonl holds more"),
        ({"sample_prompts": str(tmp_path / "no.txt")}, "`--sample-prompts` must be a file"),
        ({"sample_tokens": 250, "sample_prompts": prompts}, "with `--sample-tokens 250` 1 of 2"),
        (
            {"sample_prompts": str(tmp_path / "texts.txt"), "tokenizer": "bytes"},
            "line 1 of .*texts.txt has the id 257, and the vocabulary",
        ),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            found(**given)
    assert sample_prompts(Settings(model="m", data=("d",), output=tmp_path), []) is None


def test_the_table_in_the_terminal():
    sample = {"prompt": "a" * 300 + "end", "answer": "[b]so[/b]\x1b[2J", "ended": False}
    sample |= {"reference": "no", "reference_ended": True}
    lines = sampled(3, [sample] * 6).splitlines()
    text = "\n".join(lines)
    assert lines[0].strip() == "answers after step 3"
    assert max(map(len, lines)) <= 100
    assert "[b]so[/b]\\x1b[2J ..." in text
    assert "no ..." not in text
    assert "..." in text.split("end")[0]
    assert "and 2 more in samples.jsonl" in text
    assert "reference" not in sampled(3, [sample | {"reference": None}])


def test_the_report_shows_answers_of_some_steps(tmp_path, capsys):
    folder = written(tmp_path / "run", 3)
    with (folder / "samples.jsonl").open("w") as file:
        for step in range(1, 21):
            for prompt in ("Why <b>?", "How?"):
                line = {"step": step, "prompt": prompt, "answer": f"{prompt} {step}."}
                line |= {"ended": True, "reference": "As before.", "reference_ended": False}
                file.write(json.dumps(line) + "\n")
        file.write('{"step": 21, "prom')
    assert report(capsys, folder)[0] == 0
    page = (folder / "report.html").read_text()
    section = page.split("<h2>Answers during training</h2>")[1].split("</section>")[0]
    assert "8 of 20 steps are shown" in section
    assert section.count("<h4>step 1</h4>") == section.count("<h4>step 20</h4>") == 2
    assert "<h4>step 2</h4>" not in section
    assert "<pre>Why &lt;b&gt;? 20.</pre>" in section
    assert section.count("<pre>As before. ...</pre>") == 2
    assert "The last line of samples.jsonl cannot be read and is left out." in page


@pytest.mark.slow
def test_samples_of_text_with_adapters_and_without_a_reference(models, tmp_path):
    (tmp_path / "data.jsonl").write_text(
        '{"prompt": "Why?", "chosen": " So.", "rejected": " No."}\n'
        '{"prompt": "How?", "chosen": " Thus.", "rejected": " No."}\n'
    )
    (tmp_path / "prompts.txt").write_text("Why?\nWho knows?\n")
    base = {"model": models("llama"), "batch_size": 2, "steps": 2, "dropout": False, **SAMPLING}
    for name, given, has_reference in (
        ("adapters", {"lora_rank": 2}, True),
        ("free", {"loss": "simpo", "sample_prompts": tmp_path / "prompts.txt"}, False),
    ):
        assert small(tmp_path, **base, **given, output=tmp_path / name) == 0
        lines = lines_of(tmp_path / name, "samples.jsonl")
        second = "Who knows?" if "sample_prompts" in given else "How?"
        assert [line["prompt"] for line in lines] == ["Why?", second]
        assert all((line["reference"] is not None) == has_reference for line in lines)


@pytest.mark.slow
def test_two_processes_answer_as_one_and_keep_the_same_best(tmp_path):
    settings = {**SAMPLING, "sample_prompts": write_prompts(tmp_path / "prompts.jsonl")}
    settings |= {"eval_data": write_data(tmp_path / "eval.jsonl", 16, 1), "eval_every": 1}
    settings |= {"keep_best": "rewards/accuracies", "eval_at_start": False, "early_stop": 2}
    lines, best, kept = [], [], []
    for count, mesh in ((1, {}), (2, {"mesh": "data=2,fsdp=2"})):
        given = {"steps": 4, "save_every": 1, "keep": 1, **settings, **mesh}
        with Processes(tmp_path, count, name=f"run{count}", **given) as processes:
            run = processes.finish()
        lines.append(lines_of(run, "samples.jsonl"))
        best.append(json.loads((run / "run.json").read_text())["best"])
        kept.append(sorted(path.name for path in (run / "checkpoints").iterdir()))
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]][:2] == [2, 2]
    assert best[0]["step"] == best[1]["step"] > 0
    assert kept[0] == kept[1] == sorted({str(best[0]["step"]), str(best[0]["last_step"])})
    assert deviation(tmp_path / "run1", tmp_path / "run2") < 5e-5
