"""`online`: rounds against the library's functions by hand, and runs that go on bit for bit."""

import collections
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import dpo_eqx as dpx
from dpo_eqx import data
from dpo_eqx.cli import main
from dpo_eqx.cli.settings.online import Online, check_online
from dpo_eqx.cli.settings.parse import flags_of
from dpo_eqx.models import RewardModel, load, sample, save

from .commands import one_message
from .interrupted import at_line, steady
from .runs import GOLDEN, lines_of, memory_after_steps, same_weights, weights_of

PROMPTS = ["Why?", "What is 2 + 2?", "So", "X", "Oh"]
JUDGES = """
def letters(prompts, answers):
    assert len(prompts) == len(answers)
    return [sum(map(str.isalpha, a)) - len(p) for p, a in zip(prompts, answers)]
def equal(prompts, answers):
    return [1.0] * len(answers)
def fails(prompts, answers):
    raise KeyError("oh")
"""
STEPS = 4
SETTINGS = {
    "batch_size": 2,
    "samples": 3,
    "max_new_tokens": 4,
    "steps": STEPS,
    "save_every": 2,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "shuffle": False,
    "seed": 3,
    "report": False,
}


def online(folder, model, **settings):
    """The exit status of a small run whose prompts and output are in `folder`."""
    (folder / "p.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "judges.py").write_text(JUDGES)
    named = {"policy": model, "prompts": folder / "p.txt", "output": folder / "run"}
    named |= {"reward": f"{folder / 'judges.py'}:letters"}
    flags = flags_of({**named, **SETTINGS, **settings})
    return main(["online", *flags])


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A run without interruption, whose reference follows the policy every two rounds."""
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        assert online(folder, models("llama"), sync_reference_every=2) == 0
    return folder


def letters(text):
    return sum(map(str.isalpha, text))


def test_the_first_rounds_by_hand(whole, models):
    """Keys, answers, rewards, pairs, loss, KL: from the public functions, prompt by prompt."""
    lines = lines_of(whole / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    policy, tokenizer = load(models("llama")), data.load_tokenizer(models("llama"))
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    mask = np.arange(16) < np.array([[len(row)] for row in ids])
    prompt = dpx.Tokens(np.array([np.pad(row, (0, 16 - len(row))) for row in ids]), mask)
    key = jax.random.fold_in(jax.random.key(3), 1)
    keys = jnp.stack([jax.random.fold_in(key, number) for number in (0, 1)])
    samples = sample(
        policy, prompt, samples=3, max_new_tokens=4, key=keys, eos=tokenizer.eos_token_id
    )
    texts = [
        [
            tokenizer.decode(row[m].tolist(), skip_special_tokens=True)
            for row, m in zip(*rows, strict=True)
        ]
        for rows in zip(np.asarray(samples.tokens.ids), samples.tokens.mask, strict=True)
    ]
    rewards = np.array(
        [[letters(t) - len(p) for t in row] for p, row in zip(PROMPTS, texts, strict=False)]
    )
    assert abs(lines[0]["reward"] - rewards.mean()) < 1e-5
    assert abs(lines[0]["reward_best"] - rewards.max(axis=1).mean()) < 1e-5
    assert abs(lines[0]["length"] - np.asarray(samples.tokens.mask).sum(axis=-1).mean()) < 1e-6
    assert abs(lines[0]["ties"] - np.mean([len(set(row)) == 1 for row in rewards.tolist()])) < 1e-6
    assert abs(lines[0]["kl"]) < 1e-5
    assert abs(lines[0]["loss"] - np.log(2)) < 1e-6
    batch = dpx.pair_samples(prompt, samples, rewards.astype(np.float32))
    scored = eqx.filter_jit(dpx.score_pairs)(policy, batch)
    chosen = np.average(scored.chosen, weights=batch.weight)
    assert abs(lines[0]["logps/chosen"] - chosen) < 1e-3
    assert abs(lines[1]["kl"]) > 1e-4, "the policy has left its reference"


@pytest.mark.slow
def test_the_folder_is_that_of_train(models, tmp_path):
    assert online(tmp_path, models("llama"), report=True) == 0
    run = tmp_path / "run"
    names = {"config.yaml", "run.json", "metrics.jsonl", "eval.jsonl", "checkpoints", "model"}
    names |= {"report", "report.html", "report.png"}
    assert {path.name for path in run.iterdir()} == names
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["samples"], settings["reward"].split(":")[1]) == (3, "letters")
    assert "eval-data" not in settings, "no flag of `online`"
    for name in ("before", "after"):
        assert len(json.loads((run / "report" / f"{name}.json").read_text())["samples"]) == 4
    page = (run / "report.html").read_text()
    assert "Samples" in page
    assert weights_of(run).keys() >= {"model.norm.weight"}


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_crash_and_resume_give_the_same_bits(step, whole, models, tmp_path, monkeypatch, capsys):
    """Before the first checkpoint, and after it, with a reference that has moved."""

    def crash():
        raise KeyboardInterrupt

    more = {"sync_reference_every": 2, "reward": f"{whole / 'judges.py'}:letters"}
    with monkeypatch.context() as patch:
        at_line(patch, step, crash)
        assert online(tmp_path, models("llama"), **more) == 130
    assert online(tmp_path, models("llama"), **more, resume=True) == 0
    assert same_weights(tmp_path / "run", whole / "run")
    assert steady(tmp_path / "run") == steady(whole / "run")
    if step > 2:
        assert "continued after step 2" in capsys.readouterr().out


def test_another_reward_is_not_continued(whole, models, capsys):
    judges = whole / "judges.py"
    before = judges.read_text()
    named = {"policy": models("llama"), "prompts": whole / "p.txt", "output": whole / "run"}
    named |= {"reward": f"{judges}:letters", "resume": True, "sync_reference_every": 2}
    flags = flags_of({**named, **SETTINGS})
    judges.write_text(before + "# changed\n")
    status = main(["online", *flags])
    one_message(status, capsys.readouterr().err, "online", "`--reward` must have the same content")
    judges.write_text(before)
    status = main(["online", *flags, "--samples", "4"])
    one_message(status, capsys.readouterr().err, "online", "`--samples` was 3, is 4")


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "parts"), [(None, 1), ("data=4,fsdp=2", 2)])
def test_a_dry_run_says_what_a_round_needs_and_judges_nothing(
    mesh, parts, models, tmp_path, capsys
):
    reward = f"{tmp_path / 'judges.py'}:fails"
    more = {"dry_run": True, "reward": reward, "batch_size": 8, "how": "all", "mesh": mesh}
    assert online(tmp_path, models("llama"), **more) == 0
    told = capsys.readouterr().out
    assert "draws 3 answers of at most 4 tokens to each of 8 prompts" in told
    assert f"judged by {reward}, and trains on at most 24 pairs" in told
    assert told.endswith("dry run: nothing was trained or written\n")
    # Parameters, a reference, and two moments of Adam in float32, and little else.
    held = float(re.search(r"arguments +([\d.]+) MB", told)[1]) * 1e6
    parameters = int(re.search(r"([\d,]+) parameters", told)[1].replace(",", ""))
    assert held == pytest.approx(4 * 4 * parameters / parts, rel=0.02)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_equal_rewards_train_nothing_and_are_told_of(models, tmp_path, capsys):
    flags = {"reward": f"{tmp_path / 'judges.py'}:equal", "steps": 2}
    assert online(tmp_path, models("llama"), **flags) == 0
    said = capsys.readouterr()
    assert said.out.count("no pair to train on") == 2
    assert said.err.startswith("dpo-eqx online: warning: At most 0.0%")
    assert [line["ties"] for line in lines_of(tmp_path / "run")] == [1.0, 1.0]
    before, after = load(models("llama")), load(tmp_path / "run" / "model")
    same = jax.tree.map(lambda one, other: bool((one == other).all()), before, after)
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=4,fsdp=2", "data=2,fsdp=2,tensor=2"])
def test_a_mesh_makes_the_same_rounds(mesh, models, tmp_path):
    more = {"batch_size": 8, "how": "all", "steps": 3, "lora_rank": 2, "dtype": "float32"}
    for name, flags in (("one", {}), ("mesh", {"mesh": mesh})):
        assert online(tmp_path, models("llama"), output=tmp_path / name, **more, **flags) == 0
    for one, other in zip(*(lines_of(tmp_path / name) for name in ("one", "mesh")), strict=True):
        for name in ("loss", "reward", "reward_best", "length", "kl", "ties"):
            assert abs(one[name] - other[name]) < 1e-4, name
    one, other = (weights_of(tmp_path / name) for name in ("one", "mesh"))
    assert all(np.abs(one[name] - other[name]).max() < 1e-4 for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("buckets", [1, 2])
def test_a_program_of_each_kind_is_compiled_once_for_each_width(buckets, models, tmp_path, caplog):
    # Seven rounds are three passes, and the last round of a pass is short of prompts.
    prompts = tmp_path / "long.txt"
    prompts.write_text("Why?\n" * 3 + "A prompt of another width? " * 3 + "\nSo\n")
    more = {"prompts": prompts, "steps": 7, "buckets": buckets}
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        assert online(tmp_path, models("llama"), **more) == 0
    found = re.findall(r"Finished XLA compilation of jit\((draw|pair|train)\)", caplog.text)
    assert collections.Counter(found) == dict.fromkeys(("draw", "pair", "train"), buckets)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ipo", "hinge", "sppo_hard", "odpo", "simpo"])
def test_losses_of_pairs(loss, models, tmp_path):
    assert online(tmp_path, models("llama"), loss=loss, steps=2) == 0
    line = lines_of(tmp_path / "run")[-1]
    assert ("kl" in line) == (loss != "simpo"), "no reference, no distance from it"


@pytest.mark.slow
def test_flags_of_train_mean_the_same(models, tmp_path):
    """Metrics of tokens, norms, answers on the way, weights of pairs."""
    base = {"steps": 2, "batch_size": 5, "save_every": 0}
    more = {"metrics": ("entropy", "num_tokens"), "log_norms": True, "wpo": True}
    shown = {"sample_every": 2, "sample_tokens": 3}
    runs = {"plain": {}, "more": more | shown}
    for name, flags in runs.items():
        assert online(tmp_path, models("llama"), **base, **flags, output=tmp_path / name) == 0
    plain, more = (lines_of(tmp_path / name)[0] for name in runs)
    assert {"entropy", "num_tokens", "grad_norm/attention"} <= more.keys() - plain.keys()
    # The answers of the first round are the same. Only the weights of their pairs differ.
    assert plain["logps/chosen"] == more["logps/chosen"]
    assert more["loss"] < 0.9 * plain["loss"], "a pair weighs at most 1"
    assert abs(plain["loss"] - np.log(2)) < 1e-6
    answers = lines_of(tmp_path / "more", "samples.jsonl")
    assert [line["prompt"] for line in answers] == PROMPTS[:4]
    assert {line["step"] for line in answers} == {2}
    assert all(isinstance(line["answer"], str) for line in answers)


@pytest.mark.slow
def test_what_waits_in_host_memory_gives_the_same_rounds(models, tmp_path, monkeypatch):
    both = {"reference_offload": True, "optimizer_offload": True}
    kinds = memory_after_steps(monkeypatch, "online")
    for name, flags in (("a", {}), ("b", both)):
        assert online(tmp_path, models("llama"), steps=2, output=tmp_path / name, **flags) == 0
    plain, offloaded = [{"device"}] * 3, [{"device"}, {"pinned_host"}, {"pinned_host"}]
    assert kinds == [plain] * 2 + [offloaded] * 2
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert steady(tmp_path / "a") == steady(tmp_path / "b")


@pytest.mark.slow
def test_the_offset_of_odpo_is_the_difference_of_the_rewards(models, tmp_path):
    # At the first step the margin is 0, so that the loss is that of the offset alone. One prompt
    # with two answers has one pair, and the mean and the best reward give its difference.
    one = {"batch_size": 1, "samples": 2, "steps": 1, "seed": 4, "output": tmp_path / "one"}
    assert online(tmp_path, models("llama"), loss="odpo", **one) == 0
    line = lines_of(tmp_path / "one")[0]
    gap = 2 * (line["reward_best"] - line["reward"])
    assert gap > 0
    assert abs(line["loss"] - np.log1p(np.exp(gap))) < 1e-5


@pytest.mark.slow
def test_adapters_and_a_reward_model(models, tmp_path):
    save(RewardModel(load(models("llama")), key=jax.random.key(0)), tmp_path / "rm")
    more = {"lora_rank": 2, "reward": tmp_path / "rm", "how": "all", "microbatches": 2}
    assert online(tmp_path, models("llama"), **more) == 0
    line = lines_of(tmp_path / "run")
    assert abs(line[0]["loss"] - np.log(2)) < 1e-6
    assert abs(line[-1]["kl"]) > 0
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.slow
def test_a_reward_is_learned(models, tmp_path):
    more = {"steps": 60, "batch_size": 5, "samples": 6, "learning_rate": 3e-3, "save_every": 0}
    assert online(tmp_path, models("llama"), **more) == 0
    rewards = [line["reward"] for line in lines_of(tmp_path / "run")]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 3


BAD = {
    "unpaired": ({"loss": "kto"}, "needs single completions, and a round makes"),
    "one answer": ({"samples": 1}, "`--samples` must be at least 2"),
    "no reward": ({"reward": "nowhere.py:f"}, "importing nowhere.py raised FileNotFoundError"),
    "temperature": ({"temperature": 0.0}, "`--temperature` must be positive; got 0.0"),
    "no prompts": (
        {"prompts": "nowhere.txt"},
        "`--prompts` must be a file, a folder, or a name of the Hugging Face hub (`owner/name`); "
        "there is no `nowhere.txt`",
    ),
    "beta": ({"beta": -1.0}, "`--beta` must be positive"),
    "another vocabulary": (
        {"reference": str(GOLDEN / "models" / "families" / "gpt2")},
        "`--reference` must have the vocabulary of `--policy`",
    ),
    "weights": ({"wpo": True, "ld_alpha": 0.5}, "`--ld-alpha` and `--wpo` contradict each other"),
    "samples": ({"sample_prompts": "p.txt"}, "`--sample-prompts` needs a number of steps"),
    "processes": ({"num_processes": 2}, "`--num-processes` needs `--coordinator HOST:PORT`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, words = BAD[case]
    status = online(tmp_path, models("llama"), **settings)
    one_message(status, capsys.readouterr().err, "online", words)
    assert not (tmp_path / "run").exists()


def test_flags_of_train_without_a_use_are_unknown(models, tmp_path, capsys):
    with pytest.raises(SystemExit):
        online(tmp_path, models("llama"), eval_data="e.jsonl")
    assert "eval-data" in capsys.readouterr().err
    settings = Online(model="m", data=("a", "b"), reward="r", output=tmp_path)
    with pytest.raises(ValueError, match="`--data` must be one source of prompts; got 2"):
        check_online(settings)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{}, {"mesh": "data=2,tensor=2", "sync_reference_every": 2}])
def test_killed_and_resumed(mesh, models, tmp_path, compiled):
    def start(output):
        named = {"policy": models("llama"), "prompts": tmp_path / "p.txt", "output": output}
        more = {"reward": f"{tmp_path / 'judges.py'}:letters", "resume": True, "steps": 20}
        words = flags_of({**named, **SETTINGS, **more, "save_every": 3, **mesh})
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 if mesh else 1}",
            "JAX_COMPILATION_CACHE_DIR": str(compiled / "online"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "dpo_eqx.cli", "online", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
        )

    (tmp_path / "p.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (tmp_path / "judges.py").write_text(JUDGES)
    assert start(tmp_path / "whole").wait(300) == 0
    killed, kills = tmp_path / "killed", 0
    for wanted in (1, 8, 13):
        process = start(killed)
        metrics = killed / "metrics.jsonl"
        while process.poll() is None and not (
            metrics.exists() and metrics.read_text().count("\n") >= wanted
        ):
            time.sleep(0.001)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills
    assert start(killed).wait(300) == 0
    assert same_weights(killed, tmp_path / "whole")
    assert steady(killed) == steady(tmp_path / "whole")
