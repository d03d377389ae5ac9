"""`sample`: what is drawn, by an independent draw of each prompt alone; continued files; parts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import data
from dpo_eqx.cli import main
from dpo_eqx.cli.compose.draws import check_fits, encode
from dpo_eqx.cli.run.growing import complete_lines
from dpo_eqx.cli.run.parts import share_of
from dpo_eqx.cli.terminal.answers import ends_of
from dpo_eqx.cli.terminal.prompts import Prompt, encode_prompt, read_prompts
from dpo_eqx.cli.terminal.texts import continuation, decode
from dpo_eqx.models import load, sample

from .commands import moved, one_message, run
from .runs import train

PROMPTS = ["Why?", "What is 2 + 2?", "So", "X", "Tell me.", "How?", "Oh"]
FLAGS = ("--max-new-tokens", 6, "--samples", 3, "--batch-size", 2, "--buckets", 1, "--seed", 5)


def draw(capsys, model, prompts, output, *flags):
    named = ("--policy", model, "--prompts", prompts, "--output", output)
    return run(capsys, "sample", *named, *FLAGS, *flags)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return path


@pytest.fixture(scope="module")
def model(models, tmp_path_factory):
    """A model of which some answers end by themselves."""
    folder = moved(models("llama"), tmp_path_factory.mktemp("model") / "model")
    every = json.dumps({"eos_token_id": list(range(0, 512, 4))})
    (folder / "generation_config.json").write_text(every)
    return folder


@pytest.fixture(scope="module")
def drawn(model, prompts, tmp_path_factory):
    """The folder of a file that was drawn without interruption."""
    folder = tmp_path_factory.mktemp("drawn")
    flags = ("--policy", model, "--prompts", prompts, "--output", folder / "whole.jsonl", *FLAGS)
    with jax.numpy_dtype_promotion("standard"):
        assert main(["sample", *map(str, flags)]) == 0
    return folder


@pytest.fixture
def whole(drawn, tmp_path):
    """A copy of the file, and of the note beside it."""
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    return tmp_path / "whole.jsonl"


@pytest.mark.slow
def test_several_devices_draw_the_same(whole, model, prompts, tmp_path, capsys):
    output = tmp_path / "mesh.jsonl"
    assert draw(capsys, model, prompts, output, "--mesh", "data=2,fsdp=1,tensor=4")[0] == 0
    for one, other in zip(lines(whole), lines(output), strict=True):
        assert other["answers"] == one["answers"]
        assert other["log_probs"] == pytest.approx(one["log_probs"], rel=1e-5)


@pytest.mark.slow
def test_each_prompt_is_drawn_as_if_alone(whole, model):
    tokenizer, policy = data.load_tokenizer(model), load(model)
    found = lines(whole)
    assert [line["prompt"] for line in found] == PROMPTS
    ends = ends_of(policy, tokenizer)
    some = [(line, place) for line in found for place in range(3)]
    assert {line["ended"][place] for line, place in some} == {True, False}
    for number in (0, 1, 6):
        before = tokenizer.encode(PROMPTS[number])
        ids = np.pad(before, (0, 16 - len(before)))
        # Twice, since the shape of the command's batches is compiled already.
        prompt = dpx.Tokens(np.tile(ids, (2, 1)), np.tile(np.arange(16) < len(before), (2, 1)))
        keys = jnp.stack([jax.random.fold_in(jax.random.key(5), number)] * 2)
        alone = sample(
            policy, prompt, samples=3, max_new_tokens=6, temperature=1.0, key=keys, eos=ends
        )
        line = found[number]
        assert (line["seed"], line["number"]) == (5, number)
        assert np.abs(np.array(line["log_probs"]) - np.asarray(alone.log_probs[0])).max() < 1e-4
        for place in range(3):
            row = np.asarray(alone.tokens.ids[0, place])[np.asarray(alone.tokens.mask[0, place])]
            ended = int(row[-1]) in ends
            assert line["ended"][place] == ended
            assert line["tokens"][place] == len(row)
            text = decode(tokenizer, before + row[: len(row) - ended].tolist())
            assert decode(tokenizer, before) + line["answers"][place] == text


@pytest.mark.slow  # compiles another number of samples
def test_neither_batches_nor_the_number_of_samples_change_a_draw(whole, model, prompts, capsys):
    output = whole.with_name("other.jsonl")
    flags = ("--samples", 2, "--batch-size", 3)
    assert draw(capsys, model, prompts, output, *flags)[0] == 0
    for one, other in zip(lines(whole), lines(output), strict=True):
        assert one["answers"][:2] == other["answers"]
    again = whole.with_name("seed.jsonl")
    assert draw(capsys, model, prompts, again, "--seed", 6, "--limit", 2)[0] == 0
    assert lines(again)[0]["answers"] != lines(whole)[0]["answers"]


# After a whole batch, inside of a line, inside of a batch, in the first line, at the end.
@pytest.mark.parametrize("cut", [(2, 0), (2, 9), (3, 0), (0, 5), (7, 0)])
def test_a_file_that_was_cut_is_continued(cut, whole, model, prompts, capsys):
    before = whole.read_bytes()
    split = before.splitlines(keepends=True)
    whole.write_bytes(b"".join(split[: cut[0]]) + (b"".join(split[cut[0] :]))[: cut[1]])
    assert draw(capsys, model, prompts, whole)[0] == 0
    assert whole.read_bytes() == before


def test_another_run_is_not_continued(whole, model, prompts, capsys, tmp_path):
    before = whole.read_bytes()
    for flags, words in (
        (("--temperature", "0.5"), "--temperature was 1.0, is 0.5"),
        (("--limit", "3"), "number of prompts was 7, is 3"),
        (("--no-resume",), "must be a new file"),
    ):
        status, _, err = draw(capsys, model, prompts, whole, *flags)
        one_message(status, err, "sample", words)
    (tmp_path / "foreign.jsonl").write_text("mine\n")
    status, _, err = draw(capsys, model, prompts, tmp_path / "foreign.jsonl")
    one_message(status, err, "sample", "has no foreign.run.json beside it")
    assert whole.read_bytes() == before
    assert (tmp_path / "foreign.jsonl").read_text() == "mine\n"


def test_parts_are_joined_by_the_last_process(whole, model, prompts, capsys, tmp_path):
    output = tmp_path / "parts.jsonl"
    # The parts begin at other prompts, so that their batches are others, too.
    for number in (1, 0):
        assert not output.exists()
        flags = ("--num-processes", 2, "--process-id", number)
        status, out, err = draw(capsys, model, prompts, output, *flags)
        assert (status, err) == (0, "")
    assert "7 prompts, 21 answers" in out
    names = ("prompt", "answers", "tokens", "ended", "seed", "number")
    for one, other in zip(lines(output), lines(whole), strict=True):
        assert [one[name] for name in names] == [other[name] for name in names]
    left = {path.name for path in tmp_path.glob("parts*")}
    assert left == {"parts.jsonl", "parts.run.json"}
    assert draw(capsys, model, prompts, output, *flags)[0] == 0, "nothing is left to do"


def test_shares_cover_all_prompts_once():
    for count in range(12):
        for parts in range(1, 5):
            shares = [share_of(count, i, parts) for i in range(parts)]
            assert [i for share in shares for i in share] == list(range(count))


def test_only_whole_lines_count(tmp_path):
    path = tmp_path / "a.jsonl"
    assert complete_lines(path) == 0
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert complete_lines(path) == 2
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'


def test_conversations_and_ids(models, tmp_path, capsys):
    """Turns get the template, texts only on request; ids are passed on as ids."""
    tools = [{"type": "function", "function": {"name": "look"}}]
    turns = [{"role": "user", "content": "Why?"}]
    records = [
        {"prompt": turns, "tools": tools},
        {"prompt": "Why?"},
        {"prompt_ids": [9, 8, 7]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    output = tmp_path / "s.jsonl"
    assert draw(capsys, models("qwen3"), tmp_path / "p.jsonl", output)[0] == 0
    conversation, text, ids = lines(output)
    assert (conversation["prompt"], conversation["tools"]) == (turns, tools)
    assert text["prompt"] == "Why?"
    assert ids["prompt_ids"] == [9, 8, 7]
    assert [len(row) for row in ids["answer_ids"]] == ids["tokens"]
    tokenizer = data.load_tokenizer(models("qwen3"))
    prompts = read_prompts(str(tmp_path / "p.jsonl"), None)
    chat = encode(prompts, tokenizer, as_turns=True, max_prompt_length=None)
    assert chat.prompts[1].value == turns
    assert chat.ids[1] == encode_prompt(tokenizer, Prompt(turns, "here"), chat=False)
    assert encode(prompts, tokenizer, as_turns=False, max_prompt_length=None).ids[1] != chat.ids[1]


class Spaces:
    """Like sentencepiece: a word has its space before it, and a text begins without one."""

    words = ("", " one", " two", " three")
    eos_token_id = 0

    def decode(self, ids):
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def test_a_text_goes_on_with_its_space():
    assert continuation(Spaces(), [1], [2, 3]) == " two three"
    assert continuation(Spaces(), [], [2, 3]) == "two three"
    assert continuation(Spaces(), [1], []) == ""


BAD = {
    "no prompts": (["--prompts", "nowhere.txt"], "there is no `nowhere.txt`"),
    "samples": (["--samples", "0"], "`--samples` must be positive; got 0"),
    "min p": (["--min-p", "1.5"], "`--min-p` must be in (0, 1]; got 1.5"),
    "temperature": (["--temperature", "-1"], "`--temperature` must not be negative; got -1.0"),
    "process": (["--process-id", "1"], "below `--num-processes`; got 1 and 1"),
    "folder": (["--output", "."], "`--output` must be a file to write"),
    "top k": (["--top-k", "0"], "`--top-k` must be positive; got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, models, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, words = BAD[case]
    status, _, err = draw(capsys, models("llama"), prompts, "out.jsonl", *flags)
    one_message(status, err, "sample", words)
    assert not list(tmp_path.iterdir())


def test_prompts_that_do_not_fit(models, tmp_path, capsys):
    """A model with learned positions: an error before it is loaded, with two ways out."""
    (tmp_path / "p.txt").write_text("a\n" + "b" * 100 + "\n")
    output = tmp_path / "s.jsonl"
    positions = json.loads((models("gpt2") / "config.json").read_text())["n_positions"]
    flags = ("--max-new-tokens", positions - 20)
    status, _, err = draw(capsys, models("gpt2"), tmp_path / "p.txt", output, *flags)
    one_message(status, err, "sample", f"line 2 of {tmp_path / 'p.txt'} has 100")
    assert "Give a smaller `--max-new-tokens`, or `--max-prompt-length 20`." in err
    tokenizer = data.load_tokenizer(models("gpt2"))
    found = read_prompts(str(tmp_path / "p.txt"), None)
    cut = encode(found, tokenizer, as_turns=False, max_prompt_length=20)
    assert (cut.cut, [len(row) for row in cut.ids]) == (1, [1, 20])
    check_fits(cut, positions, positions - 20, 512)


def start(model, prompts, output, compiled, *flags):
    named = ("--policy", model, "--prompts", prompts, "--output", output)
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(compiled / "sampled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
    }
    words = [str(word) for word in ("sample", *named, *FLAGS, *flags)]
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_eqx.cli", *words], env=environment, stdout=subprocess.DEVNULL
    )


@pytest.mark.slow
def test_killed_and_started_again(model, tmp_path, compiled):
    (tmp_path / "p.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS * 20))
    assert start(model, tmp_path / "p.txt", tmp_path / "whole.jsonl", compiled).wait(300) == 0
    output = tmp_path / "killed.jsonl"
    kills = 0
    for wanted in (1, 17, 50):
        process = start(model, tmp_path / "p.txt", output, compiled)
        while process.poll() is None and not (
            output.exists() and output.read_bytes().count(b"\n") >= wanted
        ):
            time.sleep(0.001)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert start(model, tmp_path / "p.txt", output, compiled).wait(300) == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_processes_at_once(model, whole, prompts, tmp_path, compiled):
    output = tmp_path / "at-once.jsonl"
    flags = [("--num-processes", 3, "--process-id", i) for i in range(3)]
    processes = [start(model, prompts, output, compiled, *own) for own in flags]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    assert [x["answers"] for x in lines(output)] == [x["answers"] for x in lines(whole)]
    names = {path.name for path in tmp_path.glob("at-once*")}
    assert names == {"at-once.jsonl", "at-once.run.json"}


@pytest.mark.slow
def test_what_is_drawn_can_be_labelled_and_trained_on(whole, model, tmp_path, capsys):
    (tmp_path / "rewards.py").write_text("def f(_, answers):\n    return list(map(len, answers))\n")
    reward = f"{tmp_path / 'rewards.py'}:f"
    output = tmp_path / "preferences.jsonl"
    flags = ("--samples", whole, "--reward", reward, "--output", output, "--how", "all")
    status, _, err = run(capsys, "label", *flags)
    assert (status, err) == (0, "")
    assert train(model=model, data=output, output=tmp_path / "run", steps=2, batch_size=2) == 0
