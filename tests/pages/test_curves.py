"""The simulated runs behind `docs/howto/read_your_report.md` show what that page says of them."""

import importlib.util

import numpy as np
import pytest

from .as_users import as_users
from .fences import DOCS

SCRIPT = DOCS / "scripts" / "curves.py"


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("curves", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with as_users():
        return module.simulate_all()


@pytest.mark.slow
def test_the_runs_are_as_the_page_describes_them(runs):
    ends = {
        name: {key: x[-20:].mean() for key, x in held.items()} for name, (_, held) in runs.items()
    }
    training = {name: x["loss"][-20:].mean() for name, (x, _) in runs.items()}
    for _, held_out in runs.values():
        assert held_out["loss"][0] == pytest.approx(np.log(2), abs=1e-5)
    healthy = ends["healthy"]
    assert healthy["loss"] < 0.62
    assert abs(training["healthy"] - healthy["loss"]) < 0.1
    assert healthy["rewards/chosen"] > healthy["rewards/rejected"]
    # Too high a rate: the held-out loss has turned, and the rewards are far from 0.
    high = runs["rate_too_high"][1]["loss"]
    assert high[-20:].mean() > high.min() + 0.02
    assert ends["rate_too_high"]["rewards/chosen"] < 3 * min(healthy["rewards/chosen"], -0.1)
    # Too low a rate: almost nothing has moved, but the accuracy has.
    assert ends["rate_too_low"]["loss"] > 0.68
    assert ends["rate_too_low"]["rewards/accuracies"] > 0.55
    assert training["noise"] > 0.6
    over_fit = runs["over_fit"][1]["loss"]
    assert training["over_fit"] < 0.3
    assert over_fit[-1] > over_fit.min() + 0.02
    fall = ends["both_fall"]
    assert fall["rewards/chosen"] < 0
    assert fall["rewards/margins"] < -fall["rewards/chosen"]
