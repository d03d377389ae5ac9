"""The examples of the page on devices, run as they stand there."""

import equinox as eqx
import jax
import pytest

from ..pages.fences import DOCS, blocks
from ..policies import assert_close

pytestmark = pytest.mark.slow  # the page runs one step in many ways, each compiled by itself
PAGE = DOCS / "devices.md"


@pytest.fixture(scope="module")
def ran():
    namespace = {}
    *roads, last = blocks(PAGE, "python")
    with jax.numpy_dtype_promotion("standard"):
        for block in roads:
            exec(compile(block, str(PAGE), "exec"), namespace)
        namespace["first"] = namespace["trained"], namespace["metrics"]
        exec(compile(last, str(PAGE), "exec"), namespace)
    return namespace


def test_the_roads_of_the_page_agree(ran):
    trained, metrics = ran["first"]
    want = eqx.filter(trained, eqx.is_array), metrics
    assert_close((ran["mapped"], ran["mapped_metrics"]), want, 1e-6)
    of_first = jax.tree.map(lambda x: x[0], (ran["pmapped"], ran["pmapped_metrics"]))
    assert_close(of_first, want, 1e-6)
    of_all = eqx.filter(ran["filter_pmapped"], eqx.is_array), ran["filter_pmapped_metrics"]
    assert_close(of_all, want, 1e-6)
    explicit = eqx.filter(ran["explicit_trained"], eqx.is_array), ran["explicit_metrics"]
    assert_close(explicit, want, 1e-6)


def test_the_loop_of_the_page_runs(ran):
    assert ran["metrics"]["grad_norm"] > 0
    assert ran["local"].pairs == 8
