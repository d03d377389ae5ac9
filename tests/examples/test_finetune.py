"""The loop of `examples/finetune.py` learns, and leaves a model that loads."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np

from dpo_eqx import models

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"


def test_finetune(tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(GOLDEN / "models" / "traces" / "llama" / "model", model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "data" / "llama" / name, model)
    # One row, so that one program is compiled.
    row = (GOLDEN / "data" / "llama" / "dataset.jsonl").read_text().splitlines()[0]
    (tmp_path / "data.jsonl").write_text(f"{row}\n" * 24)
    flags = ["--model", model, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"]
    command = ["finetune.py", *map(str, flags), "--learning-rate", "1e-3"]
    monkeypatch.setattr(sys, "argv", command)
    with jax.numpy_dtype_promotion("standard"):
        runpy.run_path(str(ROOT / "examples" / "finetune.py"))
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", capsys.readouterr().out)]
    assert losses[0] == 0.6931
    assert losses[-1] < 0.69
    before, after = models.load(model), models.load(tmp_path / "out")
    assert not np.array_equal(before.embedding.weight, after.embedding.weight)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        model / "tokenizer.json"
    ).read_bytes()
