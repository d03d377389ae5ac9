"""Settings from flags and YAML: which wins, what is a number, what is refused and how."""

import dataclasses
import re
from pathlib import Path

import pytest

from dpo_eqx.cli._main import main
from dpo_eqx.cli.commands.evaluate import Evaluate
from dpo_eqx.cli.compose.policy import load_policy
from dpo_eqx.cli.settings.check import check
from dpo_eqx.cli.settings.parse import parse
from dpo_eqx.cli.settings.settings import Settings
from dpo_eqx.cli.settings.shared_flags import parse_flags
from dpo_eqx.cli.settings.yaml_file import differences, read_settings, write_settings

from .small import MODEL

EVALUATED = {"eval_data": ("e",), "eval_every": 1}
NEEDED = ["--model", "m", "--data", "d", "--output", "o"]


def written(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    text = "batch-size: 4\nbeta: 0.3\nloss: [sigmoid, sft]\nloss_weights: [1, 1e-1]\nresume: yes\n"
    path = written(tmp_path, text + "shuffle: false\nlearning_rate: 1e-6\nlog: tensorboard\n")
    flags = ["--beta", "0.5", "--no-resume", "--loss_weights", "2", "3"]
    settings = parse(["--config", str(path), *NEEDED, *flags])
    assert settings == Settings(
        config=path,
        model="m",
        data=("d",),
        output=Path("o"),
        batch_size=4,
        beta=0.5,
        loss=("sigmoid", "sft"),
        loss_weights=(2.0, 3.0),
        shuffle=False,
        learning_rate=1e-6,
        log=("tensorboard",),
    )
    assert settings.max_length is None
    assert settings.seed == 0


def test_what_is_needed_may_be_in_the_file(tmp_path):
    path = written(tmp_path, "model: m\ndata: -d\noutput: o\nlora-alpha:\neval-data:\n")
    assert parse([f"--config={path}"]).data == ("-d",)
    assert parse([f"--config={path}"]).eval_data == ()


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (["--data", "a:0.3", "b"], ("a:0.3", "b")),
        (["--data", "a", "--seed", "1", "--data", "b", "c"], ("a", "b", "c")),
        (["--data=a", "--data=b=c", "--no-shuffle"], ("a", "b=c")),
        (["--data=-a", "--beta", "1"], ("-a",)),
    ],
)
def test_several_data_in_one_flag_or_in_several(words, data, tmp_path):
    path = written(tmp_path, "data: [x, y]\n")
    flags = ["--config", str(path), *words, "--model", "m", "--output", "o"]
    assert parse(flags).data == data
    assert parse([*flags[:2], *flags[-4:]]).data == ("x", "y")


def test_several_held_out_sets_in_one_flag_or_in_several():
    for flags in (["--eval-data", "a=b", "c=d"], ["--eval-data=a=b", "--eval_data=c=d"]):
        assert parse([*NEEDED, *flags]).eval_data == ("a=b", "c=d")


@pytest.mark.parametrize("text", ["1e-6", "1E-6", "1.0e-6", "0.000001", "1e-06"])
def test_a_number_is_a_number(tmp_path, text):
    assert read_settings(written(tmp_path, f"learning-rate: {text}")) == {"learning_rate": 1e-6}


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "config.yaml"
    settings = Settings(
        model="m",
        data=("1e5",),
        output=tmp_path,
        learning_rate=3e-7,
        loss=("ipo",),
        cache=Path("c"),
        lora_target="a|b",
        resume=True,
    )
    write_settings(settings, path)
    read = read_settings(path)
    assert "resume" not in read
    assert Settings(**read) == dataclasses.replace(settings, resume=False)
    assert differences(settings, read) == {}
    assert differences(dataclasses.replace(settings, seed=2), read) == {"seed": (0, 2)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "batch-sise: 4",
            r"`batch-sise` in line 1 of .* is not a setting. Did you mean `batch-size`",
        ),
        ("beta: 1\nbta: 4", r"`bta` in line 2 .* Did you mean `beta`"),
        ("qqqq: 1", r"`qqqq` in line 1 of \S+ is not a setting. `--help`"),
        ("config: x.yaml", "`config` in line 1 .* is not a setting"),
        ("batch-size: 4\nbatch_size: 5", "`batch_size` in line 2 .* given twice"),
        ("steps: ten", "`steps` in line 1 .* must be an integer; got 'ten'"),
        ("steps: 1.5", "`steps` in line 1 .* must be an integer; got 1.5"),
        ("steps: true", r"`steps` .* must be an integer; got True \(bool\)"),
        ("beta: [1]", r"`beta` .* must be a number; got \[1\]"),
        ("shuffle: 1", "`shuffle` .* must be true or false; got 1"),
        ("model: 3", "`model` .* must be text; got 3"),
        ("schedule: cos", "`schedule` .* must be one of constant, linear, .* wsd; got 'cos'"),
        ("log: [tensorboard, foo]", "`log` .* must be one of tensorboard, wandb"),
        ("beta: [1", "is not YAML: .*line 1"),
        ("- beta", "must be a mapping of settings"),
        ("beta: !!python/object:os.system x", "is not YAML"),
    ],
)
def test_a_wrong_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_settings(written(tmp_path, text))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="`--config` must be a YAML file; there is no"):
        parse(["--config", str(tmp_path / "no.yaml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-sise", "4"], "--batch-size"),
        (["--steps", "ten"], "--steps"),
        (["--schedule", "cos"], "Expected one of"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse([*NEEDED, *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reference_free": True, "reference": "r"}, "`--reference-free` and `--reference` contr"),
        ({"reference_free": True, "precompute_reference": True}, "`--precompute-reference` contr"),
        ({"reference_free": True, "sync_reference_every": 2}, "`--sync-reference-every` contr"),
        ({"precompute_reference": True, "sync_reference_every": 2}, "contradict each other"),
        ({"lora_rank": 2, "sync_reference_every": 2}, "contradict each other"),
        ({"lora_alpha": 2.0}, "`--lora-alpha` is for adapters"),
        ({"lora_target": "x"}, "`--lora-target` is for adapters"),
        ({"eval_every": 2}, "`--eval-every` needs preferences .* give `--eval-data` too"),
        ({"eval_at_start": False}, "`--no-eval-at-start` needs .* give `--eval-data` too"),
        ({"keep_best": "loss"}, "`--keep-best` needs .* give `--eval-data` too"),
        ({"early_stop": 2, **EVALUATED}, "`--early-stop` needs a metric .* such as `--keep-best l"),
        ({"early_stop": 2, "keep_best": "loss", "eval_data": ("e",)}, "give `--eval-every` too"),
        ({"early_stop": 0}, "`--early-stop` must be positive; got 0"),
        ({"keep_best": "grad", **EVALUATED}, "Give `--keep-best min:grad` or `max:grad`"),
        ({"sample_prompts": "p.txt"}, "`--sample-prompts` needs .* give `--sample-every` too"),
        ({"sample_every": -1}, "`--sample-every` must not be negative"),
        ({"sample_tokens": 0}, "`--sample-tokens` must be positive"),
        (
            {"sample_every": 1, "reward_head": True, "loss": ("bradley_terry",)},
            "`--reward-head` and `--sample-every` contradict each other",
        ),
        ({"eval_data": ("a=b", "c")}, "`--eval-data` must give each of several sets a name"),
        ({"loss_weights": (1.0, 2.0)}, "must have one weight for each loss, 1; got 2"),
        ({"loss": ()}, "`--loss` must name at least one loss"),
        ({"batch_size": 8, "microbatches": 3}, "`--microbatches` must divide .* got 3 and 8"),
        ({"batch_size": 0}, "`--batch-size` must be positive; got 0"),
        ({"steps": -1}, "`--steps` must be positive"),
        ({"beta": float("nan")}, "`--beta` must be positive; got nan"),
        ({"learning_rate": float("inf")}, "`--learning-rate` must be positive; got inf"),
        ({"max_grad_norm": -1.0}, "`--max-grad-norm` must not be negative"),
        ({"sync_reference_alpha": 1.5}, r"must be in \[0, 1\]; got 1.5"),
        ({"keep": 0}, "`--keep` must be positive"),
        (
            {"lora_rank": 2, "lora_target": "("},
            r"`--lora-target` must be a regular expression; got '\(' \(missing \)",
        ),
    ],
)
def test_contradictions(given, message):
    with pytest.raises(ValueError, match=message):
        check(Settings(model="m", data=("d",), output=Path("o"), **given))


def test_all_contradictions_are_told_at_once():
    given = {"lora_rank": 2, "sync_reference_every": 2, "pack": True, "wpo": True}
    with pytest.raises(ValueError, match="contradict") as caught:
        check(Settings(model="m", data=("d",), output=Path("o"), **given))
    assert [line.split(" contradict")[0] for line in str(caught.value).splitlines()] == [
        "`--lora-rank` and `--sync-reference-every`",
        "`--pack` and `--wpo`",
    ]


def test_each_command_can_do_without_the_fused_kernel():
    settings = parse(["--model", str(MODEL), "--data", "d", "--output", "o", "--no-fused"])
    assert not load_policy(settings).config.fused
    flags = parse_flags(Evaluate, "evaluate", [*NEEDED, "--no-fused"])
    assert not flags.load(str(MODEL)).config.fused


def boxes(capsys, command):
    """The flags in each box of the help of a command, by the title of the box."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    _, *titles = re.split(r"^\W+((?:\w+ )?options)\W*$", text, flags=re.MULTILINE)
    pairs = zip(titles[::2], titles[1::2], strict=True)
    return {title: re.findall(r"^\W* (--[\w-]+)", box, re.MULTILINE) for title, box in pairs}


def test_help_shows_the_flags_in_groups(capsys):
    found = boxes(capsys, "train")
    assert list(found)[1:4] == ["model options", "data options", "run options"]
    assert found["model options"][0] == "--model"
    assert found["data options"][0] == "--data"
    assert {"--lora-rank", "--quantize"} <= set(found["adapter options"])
    flags = [flag for box in found.values() for flag in box]
    assert sorted(flags) == sorted(
        f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Settings)
    )


def test_help_shows_what_a_command_changes_first_and_leaves_out_what_it_has_not(capsys):
    found = boxes(capsys, "online")
    assert found["options"][0] == "--model"
    assert {"--reward", "--samples", "--batch-size"} <= set(found["options"])
    flags = [flag for box in found.values() for flag in box]
    assert len(flags) == len(set(flags))
    assert "--eval-data" not in flags
    assert all(found.values()), "no box is empty"
    # The command has its own text for `--mesh`, which comes first.
    assert "--mesh" in found["options"]
    assert found["device options"] == ["--coordinator", "--num-processes", "--process-id"]


def test_help_names_what_a_flag_takes_and_its_default_once(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--steps N Largest number of optimiser steps (default: set by `--epochs`). --" in text
    assert "--loss-weights NUMBER ... Weights" in text
    assert "--quantize int8|nf4 Hold" in text
    assert "--keep N Number of checkpoints to keep. (default: 2)" in text
    assert "None" not in text
