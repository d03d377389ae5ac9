"""`dpo-eqx label`: rewards for drawn answers, and preferences that `dpo-eqx train` reads.

`dpo-eqx sample` draws the answers. Rewards are kept in a file of their own, so that no answer is
judged twice.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data._fingerprint import digest_files
from ..compose.functions import load_function
from ..compose.pairing import Account, How, preferences, without_cut
from ..compose.rewards import (
    Asked,
    Judge,
    function_judge,
    model_judge,
)
from ..run import growing, parts
from ..run.folder import replace_text
from ..run.inputs import digest_reward
from ..settings.check import check_positive
from ..settings.groups.memory import Dtype
from ..settings.options import is_function
from ..settings.shared_flags import check_writable, parse_flags
from ..terminal.display import display, say

_TEMPLATE = ("tools", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label:
    """Judges drawn answers by a reward, and writes pairs of a better and a worse one."""

    samples: Path
    """The file that `dpo-eqx sample` has written."""
    reward: str
    """The folder or hub name of a reward model, or a Python function as `module:function` or
    `file.py:function`. It is called with a list of prompts and a list of answers, and returns a
    number for each answer."""
    output: Path
    """The JSON Lines file of preferences to write. The rewards of all answers come beside it."""
    how: How = "best_worst"
    """The pairs of a prompt: its best and its worst answer, all pairs, or one random pair."""
    min_gap: float = 0.0
    """Leave out pairs whose rewards differ by less. Equal rewards are no pair in any case."""
    drop_cut: bool = False
    """Leave out answers that were cut off by `--max-new-tokens` of `dpo-eqx sample`."""
    seed: int = 0
    """Seed of the random pairs."""
    batch_size: int = 8
    """Number of prompts whose answers are judged at once."""
    chat_template: str = "tokenizer"
    """The chat template of a reward model: a file with a Jinja template, `none`, or `tokenizer` for
    its tokenizer's own."""
    dtype: Dtype | None = None
    """Parameter dtype of a reward model (default: as stored in the checkpoint)."""
    reward_timeout: float = 600.0
    """The longest time that a call of a Python function may take, in seconds."""
    resume: bool = True
    """Keep the rewards that an earlier process has found for `--output`; otherwise an existing file
    is an error."""
    num_processes: int = 1
    """Number of processes that judge a part of the answers each. The last one to end joins the
    parts, and writes the preferences."""
    process_id: int = 0
    """The number of this process, from 0."""


def label(arguments: Sequence[str]) -> None:
    """Runs the command with its flags in `arguments`.

    **Raises:**

    `ValueError`, `OSError` or `ImportError` with a message for the user.
    """
    flags = parse_flags(Label, "label", arguments)
    _check(flags)
    lines = _read(flags.samples)
    if flags.drop_cut:
        _check_ended(lines, flags.samples)
    function = load_function(flags.reward, "--reward") if is_function(flags.reward) else None
    rewards_file = growing.beside(flags.output, "rewards.jsonl")
    if not _is_judged(flags, function, lines, rewards_file):
        return
    rewards = [line["rewards"] for line in growing.read_objects(rewards_file, "--output")]
    account = Account()
    if flags.drop_cut:
        lines, rewards = without_cut(lines, rewards, account)
    pairs = preferences(
        lines, rewards, how=flags.how, min_gap=flags.min_gap, seed=flags.seed, account=account
    )
    text = "".join(json.dumps(pair) + "\n" for pair in pairs)
    say(str(account))
    if not account.pairs:
        raise ValueError(
            f"No pair is left of {flags.samples}, so {flags.output} is not written: {account}. "
            "Draw more answers with `dpo-eqx sample --samples`, give a smaller `--min-gap`, or "
            "another `--reward`."
        )
    replace_text(flags.output, text)
    say(f"done: {flags.output}; the rewards of all answers: {rewards_file}")


def _is_judged(
    flags: Label, function: Any, lines: Sequence[dict[str, Any]], rewards_file: Path
) -> bool:
    """Judges this process's part of the answers; whether the rewards of all are then there."""
    paths = parts.part_paths(rewards_file, flags.num_processes)
    growing.begin(
        flags.output,
        _facts(flags, function),
        resume=flags.resume,
        outputs=(rewards_file, flags.output, *paths),
    )
    shares = _shares(len(lines), flags.batch_size, len(paths))
    share, path = shares[flags.process_id], paths[flags.process_id]
    if len(paths) == 1 or not rewards_file.exists():
        done = growing.complete_lines(path)
        say(_about(flags, len(lines), len(share), done))
        own = lines[share.start : share.stop]
        if done < len(own):
            _judge_all(_judge(flags, function, lines), own, done, flags.batch_size, path)
        path.touch()  # a share may be empty
    if parts.join(rewards_file, paths, [len(share) for share in shares]):
        return True
    say(f"done: {path}; the last process to end joins the parts, and writes the preferences")
    return False


def _shares(count: int, batch_size: int, processes: int) -> list[range]:
    """The numbers of the prompts, out of `count`, that each process judges.

    They are whole batches of one process alone, so that a reward model gives the same bits: the
    rows of a batch are padded to a common width.
    """
    batches = math.ceil(count / batch_size)
    of_process = [parts.share_of(batches, i, processes) for i in range(processes)]
    return [
        range(*(min(number * batch_size, count) for number in (share.start, share.stop)))
        for share in of_process
    ]


def _about(flags: Label, count: int, own: int, done: int) -> str:
    words = f"{count} prompts of {flags.samples}"
    if flags.num_processes > 1:
        words += f"; process {flags.process_id} of {flags.num_processes} judges {own}"
    return words + (f"; {done} are judged already" if done else "")


def _judge(flags: Label, function: Any, lines: Sequence[dict[str, Any]]) -> Judge:
    most = flags.batch_size * max(len(line["answers"]) for line in lines)
    if function is not None:
        return function_judge(function, most=most, timeout=flags.reward_timeout)
    return model_judge(
        flags.reward,
        chat_template=flags.chat_template,
        template_flag="--chat-template",
        dtype=flags.dtype,
        most=most,
    )


def _judge_all(
    judge: Judge, lines: Sequence[dict[str, Any]], done: int, batch_size: int, path: Path
) -> None:
    """Appends the rewards of each prompt that the file does not hold yet."""
    # A batch that was half written is judged again as a whole: its rewards then have the same bits.
    first, skipped = divmod(done, batch_size)
    batches = math.ceil(len(lines) / batch_size)
    with growing.appending(path) as write, display(first, batches, what="batch") as show:
        for number in range(first, batches):
            part = lines[number * batch_size : (number + 1) * batch_size]
            asked = [
                Asked(line["prompt"], answer, {n: line[n] for n in _TEMPLATE if n in line})
                for line in part
                for answer in line["answers"]
            ]
            rewards = iter(judge(asked).tolist())
            by_prompt = [[next(rewards) for _ in line["answers"]] for line in part]
            for row in by_prompt[skipped:]:
                write({"rewards": row})
            skipped = 0
            values = [value for row in by_prompt for value in row]
            show(number + 1, {"reward": sum(values) / len(values)})


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines of a complete file of samples."""
    lines = growing.read_objects(path, "--samples")
    for number, line in enumerate(lines, 1):
        answers = line.get("answers")
        is_answered = isinstance(answers, list) and all(isinstance(a, str) for a in answers)
        if not is_answered or not answers or not isinstance(line.get("prompt"), str | list):
            raise ValueError(
                f"`--samples` must have a `prompt` and `answers`, a list of texts, in each line; "
                f"record {number} of {path} does not. `dpo-eqx sample` writes such files."
            )
    note = growing.beside(path, "run.json")
    expected = None
    if note.exists():
        expected = json.loads(note.read_text(encoding="utf-8")).get("number of prompts")
    if expected not in (None, len(lines)):
        raise ValueError(
            f"`--samples` must be complete; {path} holds {len(lines)} of {expected} prompts. Let "
            "`dpo-eqx sample` finish it, with the same flags as before."
        )
    if not any(len(line["answers"]) > 1 for line in lines):
        raise ValueError(
            f"`--samples` must have several answers to a prompt to compare; {path} has "
            f"{len(lines)} prompts and no such one. Draw more with `dpo-eqx sample --samples`."
        )
    return lines


def _check_ended(lines: Sequence[dict[str, Any]], path: Path) -> None:
    for number, line in enumerate(lines, 1):
        ended = line.get("ended")
        if not isinstance(ended, list) or [type(e) for e in ended] != [bool] * len(line["answers"]):
            raise ValueError(
                f"`--drop-cut` needs `ended`, whether each answer ended by itself, in each line; "
                f"record {number} of {path} does not have it. `dpo-eqx sample` writes it."
            )


def _facts(flags: Label, function: Any) -> dict[str, Any]:
    """What decides the rewards, for the note beside them; how they are paired may change."""
    names = ("reward", "chat_template", "dtype", "batch_size", "num_processes")
    return {
        "command": "label",
        **{f"--{name.replace('_', '-')}": getattr(flags, name) for name in names},
        "digest of --samples": digest_files([flags.samples]),
        "digest of --reward": digest_reward(flags.reward, function),
    }


def _check(flags: Label) -> None:
    for name in ("batch_size", "reward_timeout", "num_processes"):
        check_positive(name, getattr(flags, name))
    parts.check_number(flags.process_id, flags.num_processes)
    if not 0 <= flags.min_gap < math.inf:
        raise ValueError(f"`--min-gap` must not be negative; got {flags.min_gap}.")
    if flags.seed < 0:
        raise ValueError(f"`--seed` must not be negative; got {flags.seed}.")
    if flags.samples.absolute() == flags.output.absolute():
        raise ValueError(f"`--output` must be another file than `--samples`; got {flags.output}.")
    check_writable("--output", flags.output)
