"""`online` as several processes: the rounds of one process, and one message if a reward fails."""

import itertools

import jax
import pytest

from dpo_eqx.models import RewardModel, load, save

from ..cli.runs import lines_of, with_tokenizer
from .processes import Processes, check_same

PROMPTS = ["Why?", "What is 2 + 2?", "So", "X", "Oh", "Who", "And then?", "No", "Yes", "Hm"]
# On the process that has the prompt `Oh` in its part, the second function fails, and the third one
# blocks.
JUDGES = """
import os, pathlib, time
def letters(prompts, answers):
    time.sleep(0.3)  # so that a test can kill it between two rounds
    log = pathlib.Path(os.environ["DPO_EQX_CACHE"]).parent / f"judged-{os.getpid()}.txt"
    with log.open("a") as file:
        file.writelines(prompt + "\\n" for prompt in prompts)
    return [sum(map(str.isalpha, a)) - len(p) for p, a in zip(prompts, answers)]
def fails(prompts, answers):
    if "Oh" in prompts:
        raise KeyError("oh")
    return letters(prompts, answers)
def blocks(prompts, answers):
    time.sleep(60 * ("Oh" in prompts))
    return letters(prompts, answers)
"""
TIMEOUT = 500  # a round has more programs than a step of `train`
SETTINGS = {
    "command": "online",
    "batch_size": 8,
    "samples": 3,
    "max_new_tokens": 4,
    "steps": 3,
    "save_every": 2,
    "how": "all",
    "learning_rate": 1e-2,
    "shuffle": False,
    "seed": 3,
    "dtype": "float32",
    "sync_reference_every": 2,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The settings of all runs; the second round of a pass has two of its eight prompts."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "p.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "judges.py").write_text(JUDGES)
    model = with_tokenizer("llama", folder / "model")
    reward = f"{folder / 'judges.py'}:letters"
    return {**SETTINGS, "model": model, "data": folder / "p.txt", "reward": reward}


@pytest.fixture(scope="module")
def single(tmp_path_factory, given):
    """What one process leaves, on one device."""
    with Processes(tmp_path_factory.mktemp("single"), 1, **given) as processes:
        return processes.finish(TIMEOUT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, "data=2,fsdp=2"),
        # All processes hold the same rows, and yet each judges a part of them.
        (2, "tensor=4"),
        # Two and two processes hold the same rows.
        (4, "data=2,tensor=2"),
    ],
)
def test_several_processes_make_the_rounds_of_one(tmp_path, given, single, count, mesh):
    compiled = tmp_path / "compiled"
    options = {"mesh": mesh, "devices": 4 // count, "compilation_cache": compiled}
    with Processes(tmp_path, count, **given, **options) as processes:
        check_same(processes.finish(TIMEOUT), single)
    assert not [path for path in compiled.rglob("*") if path.is_file()], "unsafe on CPUs"
    assert abs(lines_of(single)[-1]["kl"]) > 1e-4, "the policy has moved"
    parts = [path.read_text().split("\n")[:-1] for path in tmp_path.glob("judged-*.txt")]
    assert len(parts) == count
    # Three answers to each of 8, 2 and 8 prompts, all judged once.
    assert sum(map(len, parts)) == 3 * (8 + 2 + 8)
    judged = itertools.chain.from_iterable(parts)
    assert sorted(judged) == sorted(3 * (PROMPTS + PROMPTS[:8]))


@pytest.mark.slow
def test_a_reward_model_judges_on_each_process(tmp_path, given):
    """It has another tokenizer, and fewer rows in a call, than in a single process."""
    model = with_tokenizer("gpt2", tmp_path / "judge")
    save(RewardModel(load(model), key=jax.random.key(3)), tmp_path / "rm")
    given = {**given, "reward": tmp_path / "rm"}
    with Processes(tmp_path, 1, **given, name="single") as processes:
        single = processes.finish(TIMEOUT)
    with Processes(tmp_path, 2, **given, mesh="data=2,fsdp=2") as processes:
        check_same(processes.finish(TIMEOUT), single)
    assert lines_of(single)[0]["ties"] < 1


@pytest.mark.slow
def test_killed_and_resumed_by_other_processes(tmp_path, given, single):
    given = {**given, "save_every": 1}
    with Processes(tmp_path, 2, **given, mesh="data=2,fsdp=2") as processes:
        processes.until_step(2, TIMEOUT)
        for process in processes.all:
            process.kill()
    assert not (processes.output / "model").exists(), "ended before it could be killed"
    with Processes(tmp_path, 1, **given) as processes:
        check_same(processes.finish(TIMEOUT), single)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "each", "message"),
    [
        ({"reward": "fails"}, {}, "process 1: `--reward` must return a reward for each answer"),
        (
            {"reward": "blocks", "reward_timeout": 5},
            {},
            "process 1: `--reward` must return within 5 s",
        ),
        ({}, {1: {"samples": 4}}, "they disagree on `samples`: 3 on process 0, 4 on process 1"),
        ({}, {1: {"reward": "nowhere.py:f"}}, "process 1: `--reward nowhere.py:f`"),
    ],
)
def test_one_clear_message_on_every_process(tmp_path, given, changed, each, message):
    settings = {**given, **changed}
    if "reward" in changed:
        settings["reward"] = given["reward"].replace("letters", changed["reward"])
    with Processes(tmp_path, 2, each=each, **settings, mesh="data=2,fsdp=2") as processes:
        statuses = processes.wait(TIMEOUT)
    for log in processes.logs:
        assert message in log.read_text(), processes.words()
        assert "Traceback" not in log.read_text()
    assert statuses == [2, 2]
    assert not (processes.output / "model").exists()
