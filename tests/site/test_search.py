"""What the site's search is asked, when a reader pastes a message or a flag."""

import json
import shutil
import subprocess

import pytest

from ..pages.fences import DOCS

SCRIPT = (DOCS / "search.js").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js")


@pytest.mark.parametrize(
    ("typed", "asked"),
    [
        ("--dry-run", "dry run"),
        ("`microbatches` must divide the batch", "microbatches must divide batch"),
        ("what is beta?", "beta"),
        ("what is it", "what is it"),  # of small words only, nothing is left out
        ("dpo_eqx.losses.dpo(...)", "dpo_eqx.losses.dpo"),
    ],
)
def test_a_query_is_made_plain(typed, asked):
    code = f"{SCRIPT}\nconsole.log(plainQuery({json.dumps(typed)}))"
    ran = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == asked


def test_the_query_is_plain_before_the_worker_gets_it():
    code = (
        "class Worker { postMessage(message) { console.log(JSON.stringify(message)) } }\n"
        f"globalThis.Worker = Worker\n{SCRIPT}\n"
        "new Worker().postMessage({ type: 2, data: '--mesh' })\n"
        "new Worker().postMessage({ type: 0, data: '--mesh' })\n"
    )
    ran = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    query, other = map(json.loads, ran.stdout.splitlines())
    assert query == {"type": 2, "data": "mesh"}
    assert other["data"] == "--mesh"  # only queries are changed
