"""The loop of `examples/finetune.py` learns, and leaves a model that loads."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import models

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def finetune(folder, monkeypatch, *, dtype, learning_rate):
    """Runs the script on a checkpoint in `dtype`; returns its global names."""
    model = folder / "model"
    stored = models.load(GOLDEN / "models" / "traces" / "llama" / "model", dtype=dtype)
    models.save(stored, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "data" / "llama" / name, model)
    # One row, so that one program is compiled.
    row = (GOLDEN / "data" / "llama" / "dataset.jsonl").read_text().splitlines()[0]
    (folder / "data.jsonl").write_text(f"{row}\n" * 24)
    flags = ["--model", model, "--data", folder / "data.jsonl", "--output", folder / "out"]
    command = ["finetune.py", *map(str, flags), "--learning-rate", learning_rate]
    monkeypatch.setattr(sys, "argv", command)
    with jax.numpy_dtype_promotion("standard"):
        return runpy.run_path(str(ROOT / "examples" / "finetune.py"))


def losses_in(text):
    return [float(loss) for loss in re.findall(r"loss (\S+)", text)]


def arrays(policy):
    return jax.tree.leaves(eqx.filter(policy, eqx.is_array))


def changed(old, new):
    """The fraction of numbers in which two policies differ."""
    pairs = zip(arrays(old), arrays(new), strict=True)
    return np.mean(np.concatenate([np.ravel(np.asarray(x) != np.asarray(y)) for x, y in pairs]))


def test_finetune(tmp_path, monkeypatch, capsys):
    finetune(tmp_path, monkeypatch, dtype=jnp.float32, learning_rate="1e-3")
    losses = losses_in(capsys.readouterr().out)
    assert losses[0] == 0.6931
    assert losses[-1] < 0.69
    before, after = (models.load(tmp_path / name) for name in ("model", "out"))
    assert not np.array_equal(before.embedding.weight, after.embedding.weight)
    names = ("out", "model")
    assert len({(tmp_path / name / "tokenizer.json").read_bytes() for name in names}) == 1


@pytest.mark.slow
def test_a_bfloat16_checkpoint_learns_from_updates_that_bfloat16_would_round_away(
    tmp_path, monkeypatch, capsys
):
    trained = finetune(tmp_path, monkeypatch, dtype=jnp.bfloat16, learning_rate="1e-5")
    losses = losses_in(capsys.readouterr().out)
    assert losses[0] == 0.6931
    assert losses[-1] < 0.692
    assert changed(trained["reference"], trained["policy"]) > 0.7
    saved = models.load(tmp_path / "out")
    assert {x.dtype for x in arrays(saved)} == {jnp.dtype(jnp.bfloat16)}
    for x, y in zip(arrays(trained["policy"]), arrays(saved), strict=True):
        assert np.array_equal(np.asarray(x).astype(jnp.bfloat16), np.asarray(y))
