"""`--score` in the command: what `inspect` shows, what a run trains, and what it refuses."""

import dataclasses
import json

import pytest

from dpo_eqx import losses
from dpo_eqx.cli.compose.data import make_batches
from dpo_eqx.cli.compose.preferences import prepare_all
from dpo_eqx.cli.run.inputs import check_same, digests_of
from dpo_eqx.cli.settings.settings import Settings

from .commands import one_message, run

TURNS = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [
        {"role": "assistant", "content": "Wait."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "So."},
    ],
    "rejected": [{"role": "assistant", "content": "No."}],
}
# Marks of the shown tokens: brackets for scored ones, parentheses for others.
FIRST = "Wait.<|im_end|>\\n"
SHOWN = {
    "completion": FIRST + "<|im_start|>user\\nAnd?<|im_end|>\\n<|im_start|>assistant\\nSo.",
    "assistant": FIRST + "So.",
    "last": "So.",
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(TURNS) + "\n")
    return path


@pytest.mark.parametrize("score", SHOWN)
def test_inspect_shows_what_is_scored(score, models, source, capsys):
    flags = ("--model", models("qwen3"), "--data", source, "--tokens", 0, "--score", score)
    status, out, _ = run(capsys, "inspect", *flags)
    assert status == 0
    line = next(line for line in out.splitlines() if line.startswith("  chosen"))
    scored = "".join(part.split("]")[0] for part in line.split("[")[1:])
    assert scored.removesuffix("\\n").removesuffix("<|im_end|>") == SHOWN[score]


def test_a_run_scores_what_it_is_told(models, source, tmp_path):
    settings = Settings(
        model=str(models("qwen3")), data=(str(source),), output=tmp_path / "run", batch_size=1
    )
    counts, digests = [], []
    for score in SHOWN:
        chosen = dataclasses.replace(settings, score=score)
        prepared = prepare_all(chosen, losses.dpo)
        with make_batches(prepared[0], chosen, training=False) as batches:
            counts.append(int(next(batches).chosen.mask.sum()))
        digests.append(digests_of(chosen, prepared))
    assert counts[0] > counts[1] > counts[2] > 0
    with pytest.raises(ValueError, match="The tokens of `--data` are others"):
        check_same(digests[0], digests[1], tmp_path)


def test_ids_have_no_turns(models, tmp_path, capsys):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}')
    flags = ("--model", models("qwen3"), "--data", path, "--score", "last")
    status, _, err = run(capsys, "inspect", *flags)
    one_message(status, err, "inspect", "`--score` must be `completion` for records of token ids")
