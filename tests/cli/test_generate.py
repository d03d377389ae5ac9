"""`generate`: prompts through the template, answers that end, two models side by side."""

import json
import re
import sys

import equinox as eqx
import numpy as np
import pytest

from dpo_eqx import data
from dpo_eqx.cli.terminal import answers
from dpo_eqx.cli.terminal.answers import ends_of
from dpo_eqx.cli.terminal.prompts import Prompt, encode_prompt, read_prompts, stored
from dpo_eqx.cli.terminal.texts import decode
from dpo_eqx.models import load

from .commands import adapted, moved, one_message, run
from .runs import DATA


def generate(capsys, model, *flags):
    return run(capsys, "generate", "--model", model, "--max-new-tokens", "6", *flags)


def test_an_answer_to_each_prompt(models, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    flags = ("--prompt", "Why?", "What is 2 + 2?", "--temperature", "0", "--output", output)
    status, out, err = generate(capsys, models("llama"), *flags)
    assert (status, err) == (0, "")
    assert re.findall(r"=== prompt (\d) of 2\n(.*)", out) == [
        ("1", "Why?"),
        ("2", "What is 2 + 2?"),
    ]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["Why?", "What is 2 + 2?"]
    # Greedy, so by hand: the likeliest token, six times. What follows has no influence.
    tokenizer, policy = data.load_tokenizer(models("llama")), eqx.filter_jit(load(models("llama")))
    ids = tokenizer.encode("Why?")
    for _ in range(6):
        logits = policy(np.pad(ids, (0, 16 - len(ids))))
        ids.append(int(logits[len(ids) - 1].argmax()))
    assert rows[0]["answer"] == decode(tokenizer, ids[-6:])
    assert rows[0]["answer"] in out


@pytest.mark.slow
def test_two_models_side_by_side(models, tmp_path, capsys, monkeypatch):
    other = moved(models("llama"), tmp_path / "other", scale=0.5)
    flags = ("--prompt", "Why?", "--temperature", "0", "--compare", other)
    flags = (*flags, "--output", tmp_path / "a.jsonl")
    status, out, _ = generate(capsys, models("llama"), *flags)
    assert status == 0
    assert out.count("\n--- ") == 2
    row = json.loads((tmp_path / "a.jsonl").read_text())
    assert row["answer"] != row["compared"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = generate(capsys, models("llama"), *flags)
    title = next(line for line in out.splitlines() if str(models("llama")) in line)
    assert str(other) in title, "in columns of one line"


def test_several_devices_give_the_same_answers(models, tmp_path, capsys):
    one, eight = tmp_path / "one.jsonl", tmp_path / "eight.jsonl"
    flags = ("--prompt", "Why?", "What is 2 + 2?", "--temperature", "0", "--output")
    assert generate(capsys, models("llama"), *flags, one)[0] == 0
    assert generate(capsys, models("llama"), *flags, eight, "--mesh", "data=4,tensor=2")[0] == 0
    assert eight.read_text() == one.read_text()
    status, _, err = generate(
        capsys, models("llama"), *flags, one, "--mesh", "data=8", "--batch-size", "3"
    )
    one_message(status, err, "generate", "`--batch-size` must be a multiple of data * fsdp = 8")


@pytest.mark.slow
def test_adapters_answer_as_the_merged_model(models, tmp_path, capsys):
    folder = adapted(models("llama"), tmp_path, scale=0.3)
    flags = ("--lora", folder / "adapter", "--prompt", "Why?", "--temperature", "0")
    output = tmp_path / "a.jsonl"
    status, out, err = generate(
        capsys, models("llama"), *flags, "--compare", folder / "model", "--output", output
    )
    assert (status, err) == (0, "")
    assert f"--- {models('llama')} with {folder / 'adapter'} (6 tokens" in out
    row = json.loads(output.read_text())
    assert row["answer"] == row["compared"]


@pytest.mark.slow  # compiles two models more
def test_adapters_on_a_quantised_base(models, tmp_path, capsys):
    adapter = adapted(models("llama"), tmp_path, scale=0.3) / "adapter"
    output = tmp_path / "a.jsonl"
    flags = ("--prompt", "Why?", "--temperature", "0", "--quantize", "nf4", "--output", output)
    flags = (*flags, "--lora", adapter, "--compare", models("llama"))
    assert generate(capsys, models("llama"), *flags)[0] == 0
    row = json.loads(output.read_text())
    assert row["answer"] != row["compared"], "the adapters are on one side only"


def test_a_folder_of_adapters_alone(models, tmp_path, capsys):
    folder = adapted(models("llama"), tmp_path)
    status, _, err = generate(capsys, folder / "adapter", "--prompt", "Why?")
    one_message(status, err, "generate", "holds adapters and no model. Give the model")


def test_the_same_seed_gives_the_same_answers(models, capsys):
    flags = ("--prompt", "Why?")
    one, again = (generate(capsys, models("llama"), *flags)[1] for _ in range(2))
    assert one == again
    assert generate(capsys, models("llama"), *flags, "--seed", "1")[1] != one


def test_text_goes_through_the_chat_template(models):
    tokenizer = data.load_tokenizer(models("qwen3"))
    text = Prompt("Why?", "here")
    ids = encode_prompt(tokenizer, text, chat=True)
    turns = Prompt([{"role": "user", "content": "Why?"}], "here")
    assert ids == encode_prompt(tokenizer, turns, chat=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(encode_prompt(tokenizer, text, chat=False)) == "Why?"
    llama = data.load_tokenizer(models("llama"))
    assert encode_prompt(llama, text, chat=True) == llama.encode("Why?")


@pytest.mark.parametrize("name", ["llama/dataset", "qwen3/dataset_conversational"])
def test_prompts_of_preferences_are_those_of_training(name, models):
    kind = name.split("/")[0]
    tokenizer = data.load_tokenizer(models(kind))
    rows, _ = data.tokenize(data.read(DATA / f"{name}.jsonl"), tokenizer)
    prompts = read_prompts(str(DATA / f"{name}.jsonl"), None)
    ids = [encode_prompt(tokenizer, prompt, chat=True) for prompt in prompts]
    trained = [row["prompt_ids"] for row in rows]
    assert [one[: len(other)] for one, other in zip(ids, trained, strict=True)] == trained
    exact = sum(one == other for one, other in zip(ids, trained, strict=True))
    assert exact >= 30, "all but those where tokens merge across the boundary"


def test_files_of_prompts(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert [p.value for p in read_prompts(str(tmp_path / "p.txt"), None)] == ["one", " two "]
    answers = {"chosen": "Q: why? So.", "rejected": "Q: why? No."}
    lines = [{"prompt": "one"}, answers, {"prompt_ids": [1, 2]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [p.value for p in read_prompts(str(tmp_path / "p.jsonl"), None)]
    assert found == ["one", "Q: why?", [1, 2]]
    assert len(read_prompts(str(tmp_path / "p.jsonl"), 2)) == 2


def test_lines_of_text_end_at_line_feeds_alone(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffone\r\ntwo\u2028more\x0cthree\n\n".encode())
    prompts = read_prompts(str(path), None)
    assert [p.value for p in prompts] == ["one", "two\u2028more\x0cthree"]
    assert prompts[1].where == f"line 2 of {path}"


TOOLS = [{"type": "function", "function": {"name": "look"}}]
TURNS = [{"role": "user", "content": "Why?"}]
ANSWERS = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
WITH_TEMPLATE = [
    {"prompt": TURNS, "tools": TOOLS, "chat_template_kwargs": {"style": "short"}},
    {"prompt": TURNS, "tools": json.dumps(TOOLS), "chat_template_kwargs": '{"style": "short"}'},
    {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
    {"chosen": "Human: Why? So.", "rejected": "Human: Why? No."},
    {"prompt": "Why?", "completion": " So.", "label": True},
]


@pytest.mark.parametrize("record", WITH_TEMPLATE)
def test_prompts_get_what_training_gives_the_template(record, models, tmp_path):
    tokenizer = data.load_tokenizer(models("qwen3"))
    tokenizer.chat_template = "{{ style }}{{ tools }}" + tokenizer.chat_template
    is_turns = isinstance(record.get("prompt"), list)
    preference = record | ANSWERS if is_turns else record
    (row,), _ = data.tokenize([preference], tokenizer)
    assert ("short" in tokenizer.decode(row["prompt_ids"])) == is_turns
    # Records of prompts alone get the same.
    for kept in [preference, record] if is_turns else [preference]:
        (tmp_path / "p.jsonl").write_text(json.dumps(kept))
        (prompt,) = read_prompts(str(tmp_path / "p.jsonl"), None)
        assert encode_prompt(tokenizer, prompt, chat=True) == row["prompt_ids"]


def test_files_hold_the_text_itself(models, tmp_path, capsys, monkeypatch):
    """Tabs, joiners and escapes of terminals: escaped on the screen alone."""
    text = "a\tb\u200d\u200c\r\x1b[31m\nc"
    monkeypatch.setattr(answers, "decode", lambda *_: text)
    ask = [{"role": "system", "content": text}, {"role": "user", "content": "Why?"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": ask}))
    flags = ("--prompt", text, "--data", tmp_path / "p.jsonl", "--output", tmp_path / "a.jsonl")
    status, out, _ = generate(capsys, models("qwen3"), *flags)
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": text, "answer": text}, {"prompt": ask, "answer": text}]
    assert out.count("a\\tb\\u200d\\u200c\\r\\x1b[31m\nc") == 4
    assert "\x1b" not in out


def test_ids_are_stored_as_their_text(models):
    tokenizer = data.load_tokenizer(models("llama"))
    prompt = Prompt(tokenizer.encode("Why?"), "here")
    assert stored(tokenizer, prompt) == "Why?"


def test_where_answers_end(models, tmp_path):
    folder = moved(models("qwen3"), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    tokenizer = data.load_tokenizer(folder)
    assert set(ends_of(load(folder), tokenizer)) >= {3, 5, tokenizer.eos_token_id}


def test_an_answer_ends_at_the_end(models, tmp_path, capsys):
    """Every token is an end: each answer is one token long, and empty."""
    folder = moved(models("llama"), tmp_path / "model")
    every = json.dumps({"eos_token_id": list(range(512))})
    (folder / "generation_config.json").write_text(every)
    output = tmp_path / "a.jsonl"
    status, out, _ = generate(capsys, folder, "--prompt", "Why?", "--output", output)
    assert status == 0
    assert "(1 token, ended)" in out
    assert json.loads(output.read_text())["answer"] == ""


BAD = {
    "nothing to answer": ([], "`--prompt` or `--data` must give a prompt to answer"),
    "no file": (["--data", "nowhere.txt"], "there is no `nowhere.txt`"),
    "an empty file": (["--data", "empty.txt"], "empty.txt holds none"),
    "an empty file of records": (["--data", "empty.jsonl"], "empty.jsonl holds none"),
    "a record without": (["--data", "odd.jsonl"], "must have a `prompt`, or `chosen`"),
    "turns without a template": (["--data", "turns.jsonl"], "the tokenizer has no chat template"),
    "tokens": (
        ["--prompt", "a", "--max_tokens", "0"],
        "`--max-new-tokens` must be positive; got 0",
    ),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "`temperature` must not be negative"),
    "top p": (["--prompt", "a", "--top-p", "2"], "`top_p` must be in (0, 1]; got 2.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "turns.jsonl").write_text('{"prompt": [{"role": "user", "content": "a"}]}\n')
    flags, words = BAD[case]
    status, _, err = generate(capsys, models("llama"), *flags)
    one_message(status, err, "generate", words)


def test_another_vocabulary(models, capsys):
    status, _, err = generate(
        capsys, models("llama"), "--prompt", "a", "--compare", models("qwen3")
    )
    one_message(status, err, "generate", "`--compare` must have the vocabulary of `--model`")
