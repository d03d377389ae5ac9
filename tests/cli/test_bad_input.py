"""Bad input: one clear message on stderr, status 2, no traceback, nothing written."""

import io
import json
import os
import re
import sys

import pytest

from dpo_eqx import losses
from dpo_eqx.cli import main
from dpo_eqx.cli.compose.data import prepare
from dpo_eqx.cli.compose.preferences import prepare_all
from dpo_eqx.cli.settings.settings import Settings

from .runs import DATA, GOLDEN, train
from .small import MODEL, small, write_data

GOOD = {"prompt": "Why?", "chosen": " So.", "rejected": " No."}
CHAT = [{"role": "user", "content": "Why?"}]


def record(**changes):
    return json.dumps(GOOD | changes)


def conversation():
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    return json.dumps({"prompt": CHAT, **answers})


TEXTS = {
    "a broken line": (
        record() + '\n{"prompt": "Why?", "chosen": oh}\n',
        "line 2 of .*data.jsonl, column 30: .*found 'oh}'",
    ),
    "a missing column": (
        '{"prompt": "Why?", "chosen": " So.", "other": " No."}\n',
        "missing: `rejected`; found: `prompt`, `chosen`, `other`",
    ),
    "a column missing later": (
        record() + '\n{"prompt": "Why?", "chosen": " So."}\n',
        "`rejected` is missing in line 2 of",
    ),
    "a null": (
        record() + "\n" + record(rejected=None) + "\n",
        "`rejected` is null in line 2 of .* Repair this record, or leave it out",
    ),
    "a wrong type": (
        record() + "\n" + record(chosen=3) + "\n",
        r"`chosen` in line 2 of .* must be text; got 3 \(int\)",
    ),
    "an empty file": ("", "holds no records"),
    "not JSON at all": ("hello\n", "line 1 of .*, column 1"),
}


def bad(capsys, tmp_path, message, status):
    """Asserts one message, no traceback, and that the output folder was not made."""
    assert status == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert error.startswith("dpo-eqx train: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", TEXTS)
def test_data(case, models, tmp_path, capsys):
    text, message = TEXTS[case]
    (tmp_path / "data.jsonl").write_text(text)
    status = train(model=models("llama"), data=tmp_path / "data.jsonl", output=tmp_path / "run")
    bad(capsys, tmp_path, message, status)


STRICT = {
    "identical completions": (record(rejected=" So."), "are the same: .*learn from. Repair or"),
    "a prompt longer than the limit": (
        record(prompt="Why? " * 99),
        "the prompt alone has .*. Raise the limit, or repair or leave out the record",
    ),
    "a completion longer than the limit": (record(chosen="So " * 99), "chosen completion cut"),
}


@pytest.mark.parametrize("case", STRICT)
def test_strict(case, models, tmp_path, capsys):
    text, message = STRICT[case]
    (tmp_path / "data.jsonl").write_text(f"{record()}\n{text}\n")
    status = train(
        model=models("llama"),
        data=tmp_path / "data.jsonl",
        output=tmp_path / "run",
        max_length=40,
        strict=True,
    )
    bad(capsys, tmp_path, f"`--strict` allows no row .*line 2 of .*{message}", status)


def test_no_row_is_left(models, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(record(prompt="Why? " * 99) + "\n")
    status = train(
        model=models("llama"), data=tmp_path / "data.jsonl", output=tmp_path / "run", max_length=40
    )
    bad(capsys, tmp_path, "(?s)No row is left .*dropped 1: the prompt alone.*\nRaise", status)


def test_no_pair_has_a_preference(tmp_path, capsys):
    """An error if all rows are so, unless the loss compares nothing."""
    same = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}
    (tmp_path / "data.jsonl").write_text(2 * (json.dumps(same) + "\n"))
    message = "No pair of .*data.jsonl has a preference: .* the same in all 2 rows"
    bad(capsys, tmp_path, message, small(tmp_path))
    settings = {"data": (str(tmp_path / "data.jsonl"),), "model": str(MODEL), "output": tmp_path}
    assert prepare_all(Settings(**settings, loss=("sft",)), losses.sft)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write(json.dumps(same | {"rejected_ids": [3]}))
    assert prepare_all(Settings(**settings), losses.dpo)


def test_no_row_has_a_weight(tmp_path, capsys):
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    (tmp_path / "data.jsonl").write_text(json.dumps({**ids, "weight": 0}) + "\n")
    bad(capsys, tmp_path, "`weight` is 0 in each row of .*--columns weight=", small(tmp_path))


def test_no_chat_template(models, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(conversation() + "\n")
    status = train(model=models("llama"), data=tmp_path / "data.jsonl", output=tmp_path / "run")
    bad(capsys, tmp_path, "chat template", status)


def test_a_tokenizer_beyond_the_vocabulary(models, tmp_path, capsys):
    status = train(
        model=GOLDEN / "models" / "families" / "llama",
        tokenizer=models("llama"),
        data=DATA / "llama" / "dataset.jsonl",
        output=tmp_path / "run",
    )
    bad(
        capsys,
        tmp_path,
        "`--tokenizer` must give ids below 96, .* of `--model`",
        status,
    )


def test_ids_beyond_the_vocabulary(tmp_path, capsys):
    ids = {"prompt_ids": [1], "chosen_ids": [2, 96], "rejected_ids": [3]}
    (tmp_path / "data.jsonl").write_text(json.dumps(ids) + "\n")
    bad(capsys, tmp_path, "below 96, .*; line 1 of .* has 96", small(tmp_path))


def test_a_reward_model_is_no_policy(tmp_path, capsys):
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    (tmp_path / "data.jsonl").write_text(json.dumps(ids) + "\n")
    status = small(tmp_path, model=GOLDEN / "models" / "reward_models" / "llama")
    bad(capsys, tmp_path, "reward_models/llama` holds a reward model", status)


CASES = {
    "no model": (
        {"model": "nowhere"},
        "`--model` must be a folder .* there is no folder 'nowhere'",
    ),
    "no data": ({"data": "nowhere.jsonl"}, "there is no `nowhere.jsonl`"),
    "no config": ({"config": "nowhere.yaml"}, "there is no nowhere.yaml"),
    "contradiction": ({"reference_free": True, "reference": "x"}, "contradict each other"),
    "unknown loss": ({"loss": "sigmod"}, "`--loss` must be one of .*cdpo.* mean `sigmoid`"),
    "a hyper-parameter": (
        {"loss": "simpo", "loss_options": "gama=0.5"},
        "`--loss-options gama` is 0.5, .* Did you mean `gamma`",
    ),
    "unneeded reference": ({"loss": "simpo", "reference": "x"}, "uses no reference"),
    "another vocabulary": (
        {"reference": str(GOLDEN / "models" / "families" / "llama-biases")},
        "`--reference` must have the vocabulary of `--model`: .*gpt2 has 96 tokens, .* has 160",
    ),
    "single completions": ({"loss": "kto"}, "needs single completions, and .* holds token ids"),
    "an unknown column": ({"columns": "prompt=question"}, "maps `prompt` to `question`"),
    "no adapter": (
        {"lora_rank": 2, "lora_target": "zzz"},
        "`--lora-target` must .*'zzz' matches none",
    ),
    "no such adapter": (
        {"lora": "nofolder", "lora_reference": "base"},
        "`--lora` must be a folder with an adapter, .* there is no folder 'nofolder'",
    ),
    "no such adapter of a reward model": (
        {"lora": "nofolder", "loss": "bradley_terry", "reward_head": True},
        "`--lora` must be a folder with an adapter, .* there is no folder 'nofolder'",
    ),
    "a name without its owner": ({"model": "gpt2"}, "a name .* with its owner, `owner/name`"),
    "a folder without a tokenizer": (
        {"data": str(DATA / "llama" / "dataset.jsonl")},
        "`--model` must hold a tokenizer; .*gpt2 has no file of one, .* one as `--tokenizer`",
    ),
    "a folder that is no tokenizer": (
        {"data": str(DATA / "llama" / "dataset.jsonl"), "tokenizer": str(DATA)},
        "`--tokenizer` must hold a tokenizer; .*data has no file of one, .* another folder",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_settings(case, tmp_path, capsys):
    settings, message = CASES[case]
    if "data" in settings:
        settings = settings | {"model": GOLDEN / "models" / "families" / "gpt2"}
        status = train(output=tmp_path / "run", **settings)
    else:
        status = small(tmp_path, **settings)
    bad(capsys, tmp_path, message, status)


def test_a_model_of_an_unknown_family(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "xlnet"}')
    for flag in ("model", "reference"):
        message = f"`--{flag}` must be a supported model; .*m cannot be read: "
        status = small(tmp_path, **{flag: str(tmp_path / "m")})
        bad(capsys, tmp_path, message + ".* got 'xlnet'. Give a checkpoint of one", status)


def test_columns_against_flags(tmp_path, capsys):
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "beta": 0.2}
    (tmp_path / "data.jsonl").write_text(json.dumps(ids) + "\n")
    bad(capsys, tmp_path, "`--beta` and the column `beta`", small(tmp_path, beta=0.1))
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    ids |= {"reference_chosen": -1.0, "reference_rejected": -2.0}
    (tmp_path / "data.jsonl").write_text(json.dumps(ids) + "\n")
    status = small(tmp_path, precompute_reference=True)
    bad(capsys, tmp_path, "--columns reference_chosen= reference_rejected=", status)


def test_a_folder_that_is_none(tmp_path, capsys):
    write_data(tmp_path / "data.jsonl")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    wrong = {"file/run": "a file", "file": "a file", "link": "a link to nothing"}
    for path, kind in wrong.items():
        assert small(tmp_path, output=tmp_path / path) == 2
        message = f"`--output` must be a folder; {tmp_path / path.split('/')[0]} is {kind}."
        assert message in capsys.readouterr().err
    bad(capsys, tmp_path, "`--cache` must be a folder; ", small(tmp_path, cache=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to(tmp_path, capsys, monkeypatch):
    # By the answer of the system, since whoever runs as root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    status = small(tmp_path)
    bad(capsys, tmp_path, f"must be a folder to write to; {tmp_path} is not", status)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints", "model"])
def test_a_folder_that_holds_a_run(name, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    assert small(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"holds a run already ({name}). Continue it with `--resume`" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
    assert (tmp_path / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["tensorboardX", "wandb"])
def test_a_logger_that_is_missing(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    status = small(tmp_path, log="tensorboard" if name == "tensorboardX" else name)
    bad(capsys, tmp_path, f"`{name}` is needed here and is not installed", status)


def test_an_extra_that_is_missing(tmp_path, capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("dpo_eqx._extras.importlib.import_module", missing)
    assert main(["train", "--help"]) == 2
    assert 'pip install ".[train]"' in capsys.readouterr().err


def test_a_terminal_with_few_characters_ends_no_command(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["--help"]) == 0
    print("Z\xfcrich \u6c49 \U0001f642", end="")
    stream.flush()
    assert stream.buffer.getvalue().endswith(b"Z\xfcrich ? ?")


def test_commands(capsys):
    assert main(["trian"]) == 2
    assert "There is no command 'trian'" in capsys.readouterr().err
    assert main([]) == main(["--help"]) == 0
    assert "train a policy on preferences" in capsys.readouterr().out


def test_the_traceback_for_those_who_want_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_EQX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="contradict"):
        small(tmp_path, reference_free=True, reference="x")


def test_messages_have_the_words_of_the_command(models, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"Aufgabe": "Why is it so?", "chosen": "So.", "rejected": "No."}))
    args = ["inspect", "--model", str(models("llama")), "--data"]
    assert main([*args, str(path)]) == 2
    error = capsys.readouterr().err
    assert "give `--columns prompt=Aufgabe`" in error
    assert "leave it out: `--columns Aufgabe=`" in error
    assert "columns={" not in error
    assert main([*args, str(path), "--columns", "Aufgabe="]) == 0
    assert main([*args, str(tmp_path / "none.jsonl")]) == 2
    assert "`--data` must be a file" in capsys.readouterr().err


def folder_of_two_splits(folder):
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(record(prompt=f"{name}!") + "\n")
    return folder


def test_splits_are_chosen_by_flags(models, tmp_path, capsys):
    folder = folder_of_two_splits(tmp_path / "set")
    args = ["--model", str(models("llama")), "--data", str(folder)]
    assert main(["inspect", *args, "--split", "test"]) == 0
    assert "(test: test.jsonl; not read: train.jsonl)" in capsys.readouterr().out
    assert main(["inspect", *args, "--split", "dev"]) == 2
    assert "`--split` must be one of ['test', 'train']" in capsys.readouterr().err

    args = ["train", *args, "--output", str(tmp_path / "run"), "--eval-data"]
    assert main([*args, str(folder), "--eval-split", "dev"]) == 2
    assert "`--eval-split` must be one of ['test', 'train']" in capsys.readouterr().err
    assert main([*args, str(tmp_path / "none")]) == 2
    assert "`--eval-data` must be a file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_held_out_data_are_other_data(models, tmp_path, capsys):
    folder = folder_of_two_splits(tmp_path / "set")
    args = ["train", "--model", str(models("llama")), "--output", str(tmp_path / "run")]
    same = [
        [str(folder), "--eval-data", str(folder)],
        [str(folder), "--eval-data", f"{folder}/../set", "--eval-split", "train"],
        [str(folder), "--split", "test", "--eval-data", str(folder / "test.jsonl")],
    ]
    for sources in same:
        assert main([*args, "--data", *sources]) == 2
        assert "`--eval-data` must hold other rows than `--data`" in capsys.readouterr().err


def test_the_held_out_split_is_read(tmp_path):
    folder = str(folder_of_two_splits(tmp_path / "set"))
    settings = Settings(
        model="",
        data=(folder,),
        eval_data=(folder,),
        eval_split="test",
        output=tmp_path,
        tokenizer="bytes",
    )
    rows = [prepare(folder, settings, 258, held_out=h).rows[0] for h in (False, True)]
    texts = [bytes(row["prompt_ids"][1:]).decode() for row in rows]
    assert texts == ["train!", "test!"]


def test_text_that_the_template_leaves_out_is_told_before_training(models, tmp_path, capsys):
    """The template has no tool calls: the first answer is only one, the second has one beside."""
    call = {"function": {"name": "look", "arguments": {"at": "it"}}}
    turns = [[{"role": "assistant", "content": text, "tool_calls": [call]}] for text in (None, "I")]
    ask, no = [{"role": "user", "content": "?"}], [{"role": "assistant", "content": "No."}]
    path = tmp_path / "data.jsonl"
    records = [{"prompt": ask, "chosen": turn, "rejected": no} for turn in turns]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    args = ["--model", str(models("qwen3")), "--data", str(path)]
    assert main(["inspect", *args]) == 0
    shown = capsys.readouterr().out
    gone = "the chat template leaves out all of an answer"
    assert f"dropped 1: {gone} (line 1 of {path}); line 1 of {path}, `chosen`\n" in shown
    assert (
        f"lost 1: the chat template leaves out text of an answer (line 2 of {path}); line 2"
        in shown
    )
    assert "record 0: dropped" in shown
    status = train(model=models("qwen3"), data=path, output=tmp_path / "run", strict=True)
    bad(capsys, tmp_path, f"`--strict` allows no row .* {re.escape(gone)} .line 1 of ", status)
