"""The pages that start and explain run as they stand there, and no page is left out.

Other tests run the other pages, and `RUN_BY` says which.
"""

import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from dpo_eqx.cli import main

from ..cli.runs import DATA, TRACES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    DOCS / "index.md",
    *sorted(page for folder in ("start", "explanation") for page in (DOCS / folder).glob("*.md")),
]
# The test that runs the Python of a page, or of all pages in a folder.
RUN_BY = {
    "coming_from": "pages/test_guides.py",
    "devices.md": "sharding/test_docs.py",
    "faq.md": "pages/test_guides.py",
    "howto": "pages/test_guides.py",
    "losses.md": "losses/test_docs.py",
    "online.md": "test_online.py",
    "policies.md": "test_policies_page.py",
}
# Their blocks are fragments around a checkpoint of the hub.
NOT_RUN = {"data.md", "models.md", "online_command.md", "seeing.md", "sft.md"}


def blocks(page, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def run(page, names):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)
    return names


@cache
def first_loop():
    return run(DOCS / "start" / "first_loop.md", {})


def named(page):
    return str(page.relative_to(DOCS).with_suffix(""))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=named)
def test_the_python_of_the_page_runs(page):
    if page.stem == "first_loop":
        names = first_loop()
        assert names["history"][0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert names["history"][-1]["rewards/accuracies"] == 1.0
        assert names["total"]["rewards/accuracies"] == 1.0
    else:  # the fragments of the first page use what a reader has after the first loop
        run(page, dict(first_loop()) if page.stem == "index" else {})


def test_what_dpo_md_prints_is_what_its_comments_say():
    names = run(DOCS / "start" / "dpo.md", {})
    shown = re.findall(r"# \[(.*)\]$", "".join(blocks(DOCS / "start" / "dpo.md", "python")), re.M)
    loss, margin = ([float(x) for x in line.split()] for line in shown)
    result = names["result"]
    np.testing.assert_allclose(result.loss, loss, atol=6e-4)
    np.testing.assert_allclose(result.chosen_reward - result.rejected_reward, margin, atol=1e-6)


@pytest.mark.slow
def test_the_commands_of_the_first_run(tmp_path, monkeypatch, capsys):
    model = tmp_path / "Qwen" / "Qwen3-0.6B"
    shutil.copytree(TRACES / "qwen3" / "model", model)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "qwen3" / name, model)
    page = DOCS / "start" / "first_run.md"
    (tmp_path / "preferences.jsonl").write_text(blocks(page, "text")[1] * 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    lines = "".join(blocks(page, "sh")).splitlines()
    assert len(lines) == 2
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        for line in lines:
            program, *arguments = shlex.split(line)
            assert program == "dpo-eqx"
            assert main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "report.html").exists()
    assert '"loss": 0.6931' in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]


def test_no_page_is_left_out():
    for page in DOCS.rglob("*.md"):
        if not blocks(page, "python") or page in PAGES:
            continue
        place = page.relative_to(DOCS)
        by = RUN_BY.get(str(place)) or RUN_BY.get(place.parts[0])
        covered = by is not None and (ROOT / "tests" / by).exists()
        assert covered or str(place) in NOT_RUN, f"no test runs the blocks of docs/{place}"
