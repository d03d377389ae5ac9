"""`label`: rewards of functions and models, pairs by a brute-force loop, rewards that are kept."""

import itertools
import json
import os
import subprocess
import sys

import equinox as eqx
import jax
import numpy as np
import pytest

from dpo_eqx import data
from dpo_eqx.cli.compose.pairing import Account, preferences
from dpo_eqx.models import RewardModel, load, save

from .commands import one_message, run

ANSWERS = [["aaa", "b", "cc"], ["x", "yy", "x"], ["same", "size", "four"], ["p", "qqqq", "rr"]]
MODULE = """
calls = []
def length(prompts, answers):
    calls.append(list(answers))
    return [len(a) for a in answers]
def equal(prompts, answers):
    return [1.0] * len(answers)
def fails(prompts, answers):
    if "qqqq" in answers:
        raise RuntimeError("judge is out")
    return length(prompts, answers)
def nan(prompts, answers):
    return [float("nan") if a == "yy" else 0 for a in answers]
number = 3
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with samples and a module of rewards."""
    monkeypatch.chdir(tmp_path)
    samples = [{"prompt": f"Q{i}", "answers": row} for i, row in enumerate(ANSWERS)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    (tmp_path / "judges.py").write_text(MODULE)
    return tmp_path


def label(capsys, reward, *flags, output="p.jsonl"):
    named = ("--samples", "s.jsonl", "--reward", reward, "--output", output)
    return run(capsys, "label", *named, "--batch-size", 2, *flags)


def wanted(how, min_gap=0.0):
    """All pairs, or those of the first best and the first worst answer, by a loop."""
    found = []
    for number, row in enumerate(ANSWERS):
        places = list(itertools.combinations(range(3), 2))
        if how == "best_worst":
            scores = [len(a) for a in row]
            places = [(scores.index(max(scores)), scores.index(min(scores)))]
        for one, other in places:
            better, worse = sorted((one, other), key=lambda i, row=row: -len(row[i]))
            gap = len(row[better]) - len(row[worse])
            if gap > 0 and gap >= min_gap:
                found.append(
                    {
                        "prompt": f"Q{number}",
                        "chosen": row[better],
                        "rejected": row[worse],
                        "chosen_score": len(row[better]),
                        "rejected_score": len(row[worse]),
                    }
                )
    return found


@pytest.mark.parametrize(("how", "min_gap"), [("best_worst", 0), ("best_worst", 2), ("all", 0)])
def test_pairs_are_those_of_a_loop(how, min_gap, folder, capsys):
    status, out, err = label(capsys, "judges.py:length", "--how", how, "--min-gap", min_gap)
    assert (status, err) == (0, "")
    assert lines(folder / "p.jsonl") == wanted(how, min_gap)
    assert [line["rewards"] for line in lines(folder / "p.rewards.jsonl")] == [
        [len(a) for a in row] for row in ANSWERS
    ]
    words = {
        ("best_worst", 0): "pairs: 3, {}; prompts without a pair: 1; {}: 1\n",
        ("best_worst", 2): "pairs: 2, {}; prompts without a pair: 2; {}: 1; pairs whose rewards "
        "differ by less than `--min-gap`, left out: 1\n",
        ("all", 0): "pairs: 8, {}; prompts without a pair: 1; {}: 1; other pairs of equal rewards, "
        "left out: 1\n",
    }
    equal = "prompts whose answers all have one reward"
    assert words[how, min_gap].format("of 12 answers to 4 prompts", equal) in out


def test_answers_that_were_cut_are_left_out(folder, capsys):
    given = [*lines(folder / "s.jsonl"), {"prompt": "Q4", "answers": ["e", "ee", "eee"]}]
    # The ids of the first row, whose longest answer was cut, must stay with their texts.
    given.append({**given[0], "prompt_ids": [7], "answer_ids": [[1, 1, 1], [2], [3, 3]]})
    first, last = [False, True, True], [False, True, False]
    ended = [first, [True] * 3, [True] * 3, last, [False] * 3, first]
    rows = [{**line, "ended": e} for line, e in zip(given, ended, strict=True)]
    (folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = label(capsys, "judges.py:length", "--drop-cut")
    assert status == 0
    assert "pairs: 3, of 11 answers to 6 prompts; answers that were cut off, left out: 7" in out
    *texts, ids = lines(folder / "p.jsonl")
    assert [(p["chosen"], p["rejected"]) for p in texts] == [("cc", "b"), ("yy", "x")]
    assert [(p["chosen_score"], p["rejected_score"]) for p in texts] == [(2, 1), (2, 1)]
    assert (ids["prompt_ids"], ids["chosen_ids"], ids["rejected_ids"]) == ([7], [3, 3], [2])
    # The rewards of all answers are kept, for another call without the flag.
    assert [len(line["rewards"]) for line in lines(folder / "p.rewards.jsonl")] == [3] * 6


def test_train_reads_them(folder, capsys):
    assert label(capsys, "judges.py:length")[0] == 0
    records = data.read(folder / "p.jsonl")
    assert [r["chosen"] for r in records] == [p["chosen"] for p in wanted("best_worst")]
    with_offset = data.read(folder / "p.jsonl", offset_from_scores=True)
    assert [r["offset"] for r in with_offset] == [2, 1, 3]


def test_random_pairs_depend_on_the_seed_and_the_number_of_the_prompt():
    rng = np.random.default_rng(0)
    rows = [{"prompt": "", "answers": list("abcdef")}] * 40
    rewards = rng.random((40, 6)).tolist()

    def draw(seed, part=40):
        options = {"how": "random", "min_gap": 0.0, "seed": seed, "account": Account()}
        return list(preferences(rows[:part], rewards[:part], **options))

    one = draw(0)
    assert len(one) == 40
    assert all(p["chosen_score"] > p["rejected_score"] for p in one)
    assert draw(0, 10) == one[:10]
    assert draw(1) != one
    assert len({(p["chosen"], p["rejected"]) for p in one}) > 10


def test_rewards_that_differ_in_float64_alone_are_no_tie():
    rows = [{"prompt": "", "answers": ["a", "b"]}]
    options = {"how": "best_worst", "min_gap": 0.0, "seed": 0}
    with jax.enable_x64(False):
        (pair,) = preferences(rows, [[1.0, 1.0 + 1e-12]], **options, account=Account())
    assert pair["chosen"] == "b"


def test_no_answer_is_judged_twice(folder, capsys):
    """After an error, with a file that was cut, and with other pairs of the same rewards."""
    (folder / "judges.py").write_text(MODULE.replace('"qqqq" in answers', "len(calls) == 1"))
    status, _, err = label(capsys, "judges.py:fails")
    one_message(status, err, "label", "RuntimeError: judge is out for the answer 'same'")
    assert len(lines(folder / "p.rewards.jsonl")) == 2
    assert not (folder / "p.jsonl").exists()
    # The module is loaded anew, so that its count begins again: the rest is a single call.
    assert label(capsys, "judges.py:fails")[0] == 0
    whole = (folder / "p.jsonl").read_bytes()
    rewards = (folder / "p.rewards.jsonl").read_bytes()
    (folder / "p.rewards.jsonl").write_bytes(rewards[:-8])
    (folder / "p.jsonl").write_bytes(whole[:-9])
    assert label(capsys, "judges.py:fails")[0] == 0
    assert (folder / "p.rewards.jsonl").read_bytes() == rewards
    assert (folder / "p.jsonl").read_bytes() == whole
    assert label(capsys, "judges.py:fails", "--how", "all")[0] == 0
    assert lines(folder / "p.jsonl") == wanted("all")


@pytest.mark.parametrize("count", [2, 3])
def test_processes_judge_a_part_each(count, folder, capsys):
    """One after another, of three one without a batch; the last one joins, and writes the pairs."""
    assert label(capsys, "judges.py:length")[0] == 0
    for number in reversed(range(count)):
        assert not (folder / "q.jsonl").exists()
        own = ("--num-processes", count, "--process-id", number)
        status, out, err = label(capsys, "judges.py:length", *own, output="q.jsonl")
        assert (status, err) == (0, "")
    batches = [2 * (number + 1) // count - 2 * number // count for number in range(count)]
    assert f"process 0 of {count} judges {2 * batches[0]}" in out
    for kind in ("jsonl", "rewards.jsonl"):
        assert (folder / f"q.{kind}").read_bytes() == (folder / f"p.{kind}").read_bytes()
    names = {path.name for path in folder.glob("q*")}
    assert names == {"q.jsonl", "q.rewards.jsonl", "q.run.json"}
    # Any of them makes other pairs of the same rewards; another number of processes is an error.
    again = ("--how", "all", "--num-processes", count, "--process-id", 1)
    status, out, _ = label(capsys, "judges.py:length", *again, output="q.jsonl")
    assert "judges" not in out
    assert lines(folder / "q.jsonl") == wanted("all")
    status, _, err = label(capsys, "judges.py:length", output="q.jsonl")
    one_message(status, err, "label", f"--num-processes was {count}, is 1")


@pytest.mark.slow
def test_processes_at_once_give_the_bits_of_one(models, folder):
    """A reward model in batches whose longest answers, and so whose widths, differ."""
    save(RewardModel(load(models("llama")), key=jax.random.key(3)), folder / "rm")
    samples = lines(folder / "s.jsonl") * 3
    samples[5] = {**samples[5], "answers": ["long " * 40, "b", "c"]}
    (folder / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))

    def start(output, *flags):
        named = ("--samples", "s.jsonl", "--reward", "rm", "--output", output, "--batch-size", "4")
        words = [sys.executable, "-m", "dpo_eqx.cli", "label", *named, *map(str, flags)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(words, env=environment, cwd=folder, stdout=subprocess.DEVNULL)

    several = [start("q.jsonl", "--num-processes", 2, "--process-id", i) for i in range(2)]
    assert [process.wait(300) for process in (start("p.jsonl"), *several)] == [0, 0, 0]
    for kind in ("jsonl", "rewards.jsonl"):
        assert (folder / f"q.{kind}").read_bytes() == (folder / f"p.{kind}").read_bytes()


def test_a_conversation_and_ids_stay_what_they_are(folder, capsys):
    turns, tools = [{"role": "user", "content": "Why?"}], [{"type": "function"}]
    samples = [
        {"prompt": turns, "tools": tools, "answers": ["a", "bb"]},
        {"prompt": "Why", "prompt_ids": [1], "answers": ["a", "bb"], "answer_ids": [[5], [6, 7]]},
    ]
    (folder / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    assert label(capsys, "judges.py:length")[0] == 0
    conversation, ids = lines(folder / "p.jsonl")
    assert conversation["prompt"] == turns
    assert conversation["tools"] == tools
    assert conversation["chosen"] == [{"role": "assistant", "content": "bb"}]
    assert (ids["prompt_ids"], ids["chosen_ids"], ids["rejected_ids"]) == ([1], [6, 7], [5])


def test_a_reward_model_reads_texts_by_its_own_tokenizer(models, folder, capsys):
    """Its rewards, by hand: the tokenizer's ids of the whole text, and the model on them."""
    model = RewardModel(load(models("llama")), key=jax.random.key(3))
    save(model, folder / "rm")
    status, _, err = label(capsys, "rm")
    assert (status, err) == (0, "")
    tokenizer = data.load_tokenizer(models("llama"))
    found = [line["rewards"] for line in lines(folder / "p.rewards.jsonl")]
    assert np.ptp(found) > 1e-3
    run_model = eqx.filter_jit(lambda model, ids, length: model(ids, length))
    for number, place in np.ndindex(4, 3):
        ids = [*tokenizer.encode(f"Q{number}{ANSWERS[number][place]}"), tokenizer.eos_token_id]
        alone = run_model(model, np.pad(ids, (0, 16 - len(ids))), len(ids))
        assert abs(found[number][place] - float(alone)) < 1e-5


BAD = {
    "no file": ("judges.py:length", ["--samples", "none.jsonl"], "there is no file none.jsonl"),
    "no function": ("judges.py:none", [], "no function `none`. It has `equal`, `fails`, `length`"),
    "no call": ("judges.py:number", [], "it has no function `number`"),
    "no module": ("nowhere:f", [], "importing nowhere raised ModuleNotFoundError"),
    "a broken module": ("broken.py:f", [], "importing broken.py raised SyntaxError"),
    "no folder": ("nowhere", [], "there is no folder 'nowhere'"),
    "nan": ("judges.py:nan", [], "got nan for the answer 'yy' to the prompt 'Q1'"),
    "all equal": ("judges.py:equal", [], "No pair is left of s.jsonl, so p.jsonl is not written"),
    "gap": ("judges.py:length", ["--min-gap", "nan"], "`--min-gap` must not be negative; got nan"),
    "foreign": ("judges.py:length", ["--output", "mine.jsonl"], "has no mine.run.json beside it"),
    "no ends": ("judges.py:length", ["--drop-cut"], "record 1 of s.jsonl does not have it"),
    "itself": ("judges.py:length", ["--output", "s.jsonl"], "must be another file than"),
    "one answer": ("judges.py:length", ["--samples", "one.jsonl"], "several answers to a prompt"),
    "no answers": ("judges.py:length", ["--samples", "mine.jsonl"], "record 1 of mine.jsonl does"),
    "not json": (
        "judges.py:length",
        ["--samples", "broken.py"],
        "line 1 of broken.py does not:",
    ),
    "incomplete": ("judges.py:length", ["--samples", "half.jsonl"], "half.jsonl holds 1 of 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, folder, capsys):
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "mine.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "one.jsonl").write_text('{"prompt": "a", "answers": ["b"]}\n')
    (folder / "half.jsonl").write_text('{"prompt": "a", "answers": ["b", "c"]}\n')
    (folder / "half.run.json").write_text('{"number of prompts": 2}')
    reward, flags, words = BAD[case]
    status, _, err = label(capsys, reward, *flags)
    one_message(status, err, "label", words)
    assert not (folder / "p.jsonl").exists()


def test_a_language_model_is_no_reward(models, folder, capsys):
    status, _, err = label(capsys, models("llama"))
    one_message(status, err, "label", "holds a language model. Train a reward model with")


def test_what_cannot_be_loaded_is_no_reward(folder, capsys):
    (folder / "empty").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for name, words in (
        ("empty", "empty cannot be loaded as one: A checkpoint needs `config.json`"),
        ("adapter", "give the folder with the merged model, such as `model` of the run that"),
        ("nowhere", "`--reward` must be a folder with a checkpoint"),
    ):
        status, _, err = label(capsys, name)
        one_message(status, err, "label", words)
        assert "`--reward` must be" in err


@pytest.mark.slow
def test_the_tokenizer_of_a_reward_model(models, folder, capsys):
    """One without a chat template, one of another vocabulary, none: no flag of a policy helps."""
    save(RewardModel(load(models("llama")), key=jax.random.key(3)), folder / "rm")
    turns = {"prompt": [{"role": "user", "content": "Why?"}], "answers": ["a", "b"]}
    (folder / "turns.jsonl").write_text(json.dumps(turns) + "\n")
    names = ("--samples", "turns.jsonl")
    status, _, err = label(capsys, "rm", *names, "--chat-template", "none", output="t.jsonl")
    words = "The tokenizer of `--reward` must have a chat template for conversations"
    one_message(status, err, "label", words)
    assert err.endswith("or give `--chat-template FILE`.\n")
    file = folder / "rm" / "tokenizer.json"
    table = json.loads(file.read_text())
    table["model"]["vocab"]["x"] = 515  # an answer
    file.write_text(json.dumps(table))
    status, _, err = label(capsys, "rm", output="f.jsonl")
    one_message(status, err, "label", "`--reward` must be a reward model")
    assert "it is 512, and 'x' has the id 515. Resize the embedding, or remove the token." in err
    file.unlink()
    status, _, err = label(capsys, "rm", output="n.jsonl")
    one_message(status, err, "label", "`--reward` must hold a tokenizer; rm has no file of one")
