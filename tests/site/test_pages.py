"""What the first pages compute, and that no page is left out.

`RUN_BY` says which test runs the Python of which page.
"""

import re

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

from ..pages.as_users import as_users, run
from ..pages.fences import DOCS, ROOT, blocks
from ..policies import Perceptron, random_batch

# A page, or a folder of pages.
RUN_BY = {
    "reference": "pages/test_guides.py",
    "coming_from": "pages/test_guides.py",
    "devices.md": "sharding/test_docs.py",
    "explanation": "pages/test_guides.py",
    "data.md": "pages/test_fragments.py",
    "faq.md": "pages/test_guides.py",
    "howto": "pages/test_guides.py",
    "index.md": "site/test_pages.py",
    "losses.md": "losses/test_docs.py",
    "models.md": "pages/test_fragments.py",
    "online.md": "test_online.py",
    "online_command.md": "pages/test_fragments.py",
    "policies.md": "test_policies_page.py",
    "seeing.md": "pages/test_fragments.py",
    "sft.md": "pages/test_fragments.py",
    "start": "pages/test_guides.py",
    "tutorials": "site/test_tutorials.py",
}


@pytest.mark.slow
@as_users()
def test_the_first_page_with_a_policy_of_the_reader():
    policy = Perceptron(jax.random.key(0))
    optimizer = optax.sgd(0.1)
    names = {
        "policy": policy,
        "reference": policy,
        "optimizer": optimizer,
        "opt_state": optimizer.init(eqx.filter(policy, eqx.is_inexact_array)),
        "batch": random_batch(0, pairs=4),
    }
    metrics = run(DOCS / "index.md", names)["metrics"]
    np.testing.assert_allclose(metrics["loss"], np.log(2), atol=1e-6)


@as_users()
def test_what_dpo_md_prints_is_what_its_comments_say():
    page = DOCS / "start" / "dpo.md"
    result = run(page)["result"]
    shown = re.findall(r"# \[(.*)\]$", "".join(blocks(page, "python")), flags=re.M)
    loss, margin = ([float(x) for x in line.split()] for line in shown)
    np.testing.assert_allclose(result.loss, loss, atol=5e-4)
    np.testing.assert_allclose(result.chosen_reward - result.rejected_reward, margin, atol=1e-6)


def test_no_page_is_left_out():
    for page in DOCS.rglob("*.md"):
        place = page.relative_to(DOCS)
        if blocks(page, "python"):
            by = RUN_BY.get(str(place)) or RUN_BY.get(place.parts[0])
            assert by is not None, f"no test runs the blocks of docs/{place}"
            assert (ROOT / "tests" / by).exists()
