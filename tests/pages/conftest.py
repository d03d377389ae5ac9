"""A folder with a small model and preferences, under the names that the pages use."""

import shutil

import pytest

from ..cli.runs import DATA, TRACES


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder of a test: a model, twelve pairs to train on and four that are not."""
    model = tmp_path / "Qwen" / "Qwen3-0.6B"
    shutil.copytree(TRACES / "qwen3" / "model", model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "qwen3" / name, model)
    lines = (DATA / "qwen3" / "dataset.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "preferences.jsonl").write_text("".join(lines[:12]))
    (tmp_path / "held-out.jsonl").write_text("".join(lines[12:16]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DPO_EQX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    return tmp_path
