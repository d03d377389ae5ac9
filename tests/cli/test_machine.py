"""What the command does with the machine: compiled programs on disk, a device without memory."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from dpo_eqx.cli import main
from dpo_eqx.cli._main import COMMANDS
from dpo_eqx.cli.commands.train import out_of_memory_explained
from dpo_eqx.cli.run.compilation_cache import use_compilation_cache
from dpo_eqx.cli.run.state import State
from dpo_eqx.cli.settings.online import Online

from .runs import lines_of, memory_after_steps, same_weights
from .small import small, write_data


@pytest.fixture
def no_cache():
    """A process in which nobody has chosen a folder for compiled programs."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("folder", ["auto", "own"])
def test_compiled_programs_have_a_folder_for_each_version_of_jax(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_EQX_CACHE", str(tmp_path / "user"))
    where = tmp_path / "user" / "compiled" if folder == "auto" else tmp_path / "own"
    use_compilation_cache(folder if folder == "auto" else str(where))
    assert jax.config.jax_compilation_cache_dir == str(where / f"jax-{jax.__version__}")


@pytest.mark.usefixtures("no_cache")
def test_no_folder_for_compiled_programs():
    use_compilation_cache("none")
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.usefixtures("no_cache")
def test_a_folder_that_the_user_gave_to_jax_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    use_compilation_cache(str(tmp_path / "other"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


@pytest.mark.usefixtures("no_cache")
def test_a_run_uses_the_folder_of_its_flag(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_eqx.cli.commands.train._train", lambda settings: None)
    flags = ["--model=m", "--data=d", "--output=o", f"--compilation-cache={tmp_path}"]
    assert main(["train", *flags]) == 0
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / f"jax-{jax.__version__}")


def test_a_device_without_memory_names_what_it_holds_and_what_helps(tmp_path, monkeypatch, capsys):
    def greedy(*_, **__):
        # More than any machine has, so that XLA raises its own error.
        return lambda state, batch, number: jnp.zeros(1 << 50, jnp.int8).block_until_ready()

    monkeypatch.setattr("dpo_eqx.cli.commands.train.make_advance", greedy)
    assert small(tmp_path, remat=True) == 2
    error = capsys.readouterr().err
    assert "dpo-eqx train: The device is out of memory." in error
    assert "It could not get 1125899.91 GB more." in error
    assert "policy" in error
    assert "optimiser" in error
    assert "the largest array is" in error
    assert "`--microbatches`" in error
    assert "`--remat`" not in error


def test_online_names_only_flags_that_it_has(tmp_path):
    settings = Online(model="m", data=("p",), reward="r", output=tmp_path)
    state = State(None, None, jnp.zeros(1), jax.random.key(0))
    with pytest.raises(MemoryError) as caught, out_of_memory_explained(settings, state):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    named = set(re.findall(r"`(--[a-z-]+)", str(caught.value)))
    assert {"--microbatches", "--reference-offload", "--mesh"} <= named
    fields = {field.name for field in dataclasses.fields(Online) if field.init}
    assert named <= {f"--{name.replace('_', '-')}" for name in fields}


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free_adamw"])
@pytest.mark.slow
def test_what_waits_in_host_memory_gives_the_same_run(optimizer, tmp_path):
    """Evaluations, checkpoints, the averages of a schedule-free optimiser and the model, too."""
    options = {"eval_data": str(write_data(tmp_path / "held.jsonl", seed=1)), "eval_every": 3}
    options |= {"optimizer": optimizer, "schedule": "constant", "report": True}
    assert small(tmp_path, **options) == 0
    both = {"reference_offload": True, "optimizer_offload": True, "output": tmp_path / "b"}
    assert small(tmp_path, **both, **options, steps=4) == 0
    assert small(tmp_path, **both, **options, resume=True) == 0
    assert same_weights(tmp_path / "run", tmp_path / "b")
    plain, other = (lines_of(tmp_path / name, "eval.jsonl") for name in ("run", "b"))
    assert plain == [line for line in other if line["step"] != 4]


@pytest.mark.slow
def test_a_step_leaves_in_host_memory_what_was_there(tmp_path, monkeypatch):
    kinds = memory_after_steps(monkeypatch, "train")
    assert small(tmp_path, steps=2, reference_offload=True, optimizer_offload=True) == 0
    assert kinds == [[{"device"}, {"pinned_host"}, {"pinned_host"}]] * 2


def test_other_errors_of_the_device_stay(monkeypatch):
    def broken(arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setitem(COMMANDS, "inspect", (broken, ""))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main(["inspect"])


def test_versions(capsys):
    assert main(["--version"]) == 0
    first = capsys.readouterr().out
    assert "dpo-eqx " in first
    assert f"jax {jax.__version__}" in first
    assert main(["train", "--version"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.slow
def test_a_dry_run_says_what_a_step_needs_and_writes_nothing(tmp_path, capsys):
    assert small(tmp_path, dry_run=True) == 0
    told = capsys.readouterr().out
    assert "10 rows" in told or "10 pairs" in told
    assert "6 steps of 4" in told
    held = re.search(r"arguments +([\d.]+) MB", told)
    assert held is not None
    assert "temporaries" in told
    assert "peak" in told
    assert not (tmp_path / "run").exists()
    # Parameters, a reference, and two moments of Adam in float32, and little else.
    parameters = int(re.search(r"([\d,]+) parameters", told)[1].replace(",", ""))
    assert float(held[1]) * 1e6 == pytest.approx(4 * 4 * parameters, rel=0.02)
