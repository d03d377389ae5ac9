"""A checkpoint in bfloat16 is trained in float32: what is kept, computed, saved, and warned of."""

import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from safetensors.numpy import load_file, save_file

from dpo_eqx import models
from dpo_eqx._jax.dtypes import in_dtype
from dpo_eqx.cli.compose import dtypes, policy as policies
from dpo_eqx.cli.compose.data import prepare
from dpo_eqx.cli.compose.dtypes import Dtypes, choose_dtypes, finished, keep_trained_wide
from dpo_eqx.cli.report import probe as report_probe
from dpo_eqx.cli.run.state import State
from dpo_eqx.cli.settings.settings import Settings

from .interrupted import at_line, steady, terminate
from .runs import lines_of, same_weights, weights_of
from .small import MODEL, small, write_data

# At this rate bfloat16 rounds almost every update away, and float32 hardly one.
RUN = {
    "dropout": False,
    "learning_rate": 1e-5,
    "schedule": "constant",
    "warmup_steps": 0,
    "steps": 4,
    "save_every": 2,
}
BF16, F16, F32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A checkpoint in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16") / "model"
    models.save(models.load(MODEL, dtype=BF16), folder)
    return folder


@pytest.fixture(scope="module")
def whole(narrow, tmp_path_factory):
    """The folder of a run with the defaults on that checkpoint, and what it said on stderr."""
    folder = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        assert small(folder, model=narrow, **RUN) == 0
    return folder


def settings_of(model, **given):
    return Settings(model=str(model), data=("d",), output=Path("o"), **given)


def checkpoint_of(run, step=RUN["steps"]):
    """The arrays of a checkpoint by their names."""
    path = run / "checkpoints" / str(step) / "state"
    return orbax.checkpoint.StandardCheckpointer().restore(path.absolute())


def params_in(run, step=RUN["steps"]):
    held = checkpoint_of(run, step)
    return {n.removeprefix("policy."): np.asarray(x) for n, x in held.items() if "policy." in n}


def params_of(policy):
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(policy, eqx.is_inexact_array))
    return {jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(x) for p, x in leaves}


def kinds(arrays):
    return {str(x.dtype) for x in jax.tree.leaves(arrays)}


@pytest.mark.slow
def test_what_is_trained_is_kept_in_float32(narrow, whole):
    run = whole / "run"
    lines = lines_of(run)
    assert abs(lines[0]["loss"] - np.log(2)) < 1e-6
    assert lines[0]["rewards/margins"] == 0
    assert lines[-1]["rewards/margins"] != 0
    # A fifth of all numbers are positions that no row reaches.
    assert min(line["update_fraction"] for line in lines) > 0.7
    floats = {n: x for n, x in checkpoint_of(run).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    assert kinds(floats) == {"float32"}, "the optimiser's moments too"
    before, now = params_of(models.load(narrow)), params_in(run)
    assert before.keys() == now.keys()
    moved = [now[name] != before[name].astype(np.float32) for name in now]
    assert np.concatenate([x.ravel() for x in moved]).mean() > 0.7


def test_the_model_is_saved_in_the_dtype_of_the_checkpoint(whole):
    run = whole / "run"
    saved, now = params_of(models.load(run / "model")), params_in(run)
    assert kinds(weights_of(run)) == {"bfloat16"}
    for name in now:
        assert np.array_equal(saved[name], now[name].astype(BF16)), name
    config = json.loads((run / "model" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")


def test_a_finished_run_is_saved_once_more_in_another_dtype(narrow, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    given = {"data": whole / "data.jsonl", "resume": True, "save_dtype": "float32"}
    assert small(tmp_path, model=narrow, **RUN, **given) == 0
    out = capsys.readouterr()
    assert "trained in float32, computed in bfloat16, saved in float32" in out.out
    assert out.err == ""
    saved, now = params_of(models.load(tmp_path / "run" / "model")), params_in(whole / "run")
    assert kinds(saved) == {"float32"}
    assert all(np.array_equal(saved[name], now[name]) for name in now)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert len(lines_of(tmp_path / "run")) == RUN["steps"], "nothing is trained again"


@pytest.mark.slow
def test_an_interrupted_run_has_the_same_bits(narrow, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_line(patch, 2, terminate)
        assert small(tmp_path, model=narrow, **RUN) == 0
    assert len(lines_of(tmp_path / "run")) < RUN["steps"]
    assert small(tmp_path, model=narrow, **RUN, resume=True) == 0
    assert same_weights(tmp_path / "run", whole / "run")
    assert steady(tmp_path / "run") == steady(whole / "run")
    ours, theirs = params_in(tmp_path / "run"), params_in(whole / "run")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_half_precision_on_request_is_warned_of(narrow, tmp_path, capsys):
    assert small(tmp_path, model=narrow, **RUN | {"steps": 2}, dtype="bfloat16") == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("dpo-eqx train: warning: `--dtype bfloat16` keeps the trained param")
    assert "every update below 1/512 of its weight" in first
    assert "of the trained numbers changed in any of the first 2 steps" in second
    assert "rounded away. Leave out `--dtype` to train the parameters in float32" in second
    held = checkpoint_of(tmp_path / "run", 2)
    assert {str(x.dtype) for name, x in held.items() if "policy." in name} == {"bfloat16"}
    assert max(line["update_fraction"] for line in lines_of(tmp_path / "run")) < 0.2


@pytest.mark.slow
def test_adapters_on_a_base_in_bfloat16(narrow, tmp_path, capsys):
    given = {"lora_rank": 2, "lora_target": "attention", "learning_rate": 1e-2}
    assert small(tmp_path, model=narrow, **RUN | {"steps": 2} | given) == 0
    assert capsys.readouterr().err == "", "A has no gradient while B is zero, which is no fault"
    run = tmp_path / "run"
    assert abs(lines_of(run)[0]["loss"] - np.log(2)) < 1e-6
    assert lines_of(run)[0]["rewards/margins"] == 0
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert kinds(params_in(run, 2) | adapter) == {"float32"}
    base, saved = load_file(narrow / "model.safetensors"), weights_of(run)
    assert kinds(saved) == {"bfloat16"}
    changed = {n.split(".", 3)[-1] for n in base if not np.array_equal(base[n], saved[n])}
    assert changed == {"attn.c_attn.weight", "attn.c_proj.weight"}


def test_a_frozen_base_stays_as_it_is_stored(narrow):
    settings = settings_of(narrow, lora_rank=2)
    policy = policies.load_policy(settings)
    policy = keep_trained_wide(policy, policies.trainable_of(policy, settings), settings)
    assert kinds(params_of(models.without_lora(policy))) == {"bfloat16"}
    assert kinds(eqx.filter(policy, models.lora_filter(policy))) == {"float32"}


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_merged_weights_are_rounded_once(narrow, quantize):
    policy = models.add_lora(
        models.load(narrow, quantize=quantize), rank=2, target="query", key=jax.random.key(0)
    )
    query = policy.layers.attention.query
    policy = eqx.tree_at(lambda p: p.layers.attention.query.up, policy, jnp.ones_like(query.up))
    term = query.scale * np.ones(query.up.shape) @ np.asarray(query.down, np.float64)
    base = models.dequantize(query.base).weight
    want = np.asarray(base, np.float64) + term
    trainable = models.lora_filter(policy)
    for saved, bound in ((F32, 1e-6), (F16, 2**-11), (BF16, 2**-8)):
        whole = finished(policy, saved, trainable, None)
        assert kinds(params_of(whole)) == {str(saved)}
        got = np.asarray(whole.layers.attention.query.weight, np.float64)
        assert (np.abs(got - want) <= bound * np.abs(want) + 1e-7).all()


def mixed(narrow, folder, **config):
    """The checkpoint with its norms in float32."""
    shutil.copytree(narrow, folder)
    tensors = load_file(folder / "model.safetensors")
    wide = {n: x.astype(F32) if ".ln_" in n else x for n, x in tensors.items()}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values = {n: x for n, x in values.items() if n not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def test_the_dtypes_of_a_run(narrow, tmp_path):
    def chosen(model, **given):
        return choose_dtypes(settings_of(model, **given))

    assert chosen(MODEL) == Dtypes(F32, F32)
    assert chosen(narrow) == Dtypes(BF16, BF16)
    assert chosen(narrow, dtype="float32") == Dtypes(BF16, BF16)
    assert chosen(MODEL, dtype="bfloat16") == Dtypes(BF16, BF16)
    assert chosen(narrow, dtype="float16") == Dtypes(F16, F16)
    assert chosen(narrow, compute_dtype="float32") == Dtypes(F32, BF16)
    assert chosen(MODEL, compute_dtype="bfloat16") == Dtypes(BF16, F32)
    assert chosen(narrow, save_dtype="float32") == Dtypes(BF16, F32)
    # What the tensors are counts, and `config.json` only where they differ.
    said = mixed(narrow, tmp_path / "said", torch_dtype="bfloat16")
    assert chosen(said) == Dtypes(BF16, None)
    assert chosen(said, save_dtype="bfloat16") == Dtypes(BF16, BF16)
    assert chosen(said, dtype="float16") == Dtypes(F16, F16)
    assert chosen(mixed(narrow, tmp_path / "unsaid")) == Dtypes(F32, None)
    assert chosen(mixed(narrow, tmp_path / "wrong", dtype="float16")) == Dtypes(F32, None)


def test_a_mixed_checkpoint_gets_its_dtypes_back(narrow, tmp_path):
    folder = mixed(narrow, tmp_path / "mixed", dtype="bfloat16")
    settings = settings_of(folder)
    policy = policies.load_policy(settings)
    loaded = dtypes.dtypes_of(eqx.filter(policy, eqx.is_inexact_array))
    kept = keep_trained_wide(policy, eqx.is_inexact_array, settings)
    assert kinds(params_of(kept)) == {"float32"}
    models.save(finished(kept, None, eqx.is_inexact_array, loaded), tmp_path / "saved")
    before, after = (load_file(p / "model.safetensors") for p in (folder, tmp_path / "saved"))
    assert kinds(before) == {"float32", "bfloat16"}
    assert all(after[n].dtype == x.dtype and np.array_equal(after[n], x) for n, x in before.items())


def test_a_reference_is_kept_as_stored_unless_it_moves(narrow, tmp_path):
    given = {"data": (str(write_data(tmp_path / "data.jsonl")),)}
    for other in (None, str(narrow)):
        for every, want in ((0, "bfloat16"), (1, "float32")):
            more = given | {"reference": other, "sync_reference_every": every}
            settings = Settings(model=str(narrow), output=tmp_path / "run", **more)
            prepared = prepare(settings.data[0], settings, 96)
            policy = policies.load_policy(settings)
            chosen = policies.choose_reference(policy, settings, prepared, needed=True)
            assert kinds(params_of(chosen.policy)) == {want}


def test_samples_are_drawn_in_the_dtype_of_the_computation(narrow, monkeypatch):
    seen = []
    monkeypatch.setattr(report_probe, "draw_answers", lambda policy, *_, **__: seen.append(policy))
    policy = in_dtype(models.load(narrow), jnp.float32)
    state = State(policy, None, None, jax.random.key(0))
    with pytest.raises(TypeError):  # what is drawn is not there
        report_probe._samples(state, [{"prompt_ids": [1]}], None, settings_of(narrow), BF16)
    assert kinds(params_of(seen[0])) == {"bfloat16"}


def test_values_that_float16_does_not_hold(tmp_path):
    settings = settings_of(MODEL, save_dtype="float16")
    wide = {"norm": np.array([1.0, 7e4], np.float32)}
    dtypes.check_saved(wide, settings)
    with np.errstate(over="ignore"):
        narrowed = {"norm": wide["norm"].astype(np.float16)}
    with pytest.raises(ValueError, match="saved in float16: `norm` has values beyond 65504"):
        dtypes.check_saved(narrowed, settings)
