"""The warning for training that moves too little: when it comes, and when it must not."""

import pytest

from dpo_eqx.cli.run.updates import UpdateWatch


def warnings(fractions, rates=None, *, dtype="float32", norm=1.0):
    """What is said while a run goes on, and at its end."""
    said = []
    rates = rates or [1e-6] * len(fractions)
    watch = UpdateWatch(max(rates, default=1e-6), dtype, said.append, narrow=dtype != "float32")
    for fraction, rate in zip(fractions, rates, strict=True):
        numbers = {"update_fraction": fraction, "learning_rate": rate, "grad_norm": norm}
        watch.add({**numbers, "loss": 0.69})
    during = list(said)
    watch.close()
    return during, said


def test_ten_steps_that_change_little():
    during, said = warnings([0.006, 0.004] * 10, dtype="bfloat16")
    assert len(during) == len(said) == 1, "it is said once, and at once"
    assert said[0].startswith(
        "At most 0.6% of the trained numbers changed in any of the first 10 steps: the other "
        "updates are smaller than bfloat16 can hold, and are rounded away. Leave out `--dtype`"
    )


def test_float32_has_another_remedy():
    (said,) = warnings([0.1])[1]
    assert "At most 10.0% of the trained numbers changed in the first step" in said
    assert "`--dtype`" not in said
    assert said.endswith("give a larger `--learning-rate`.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_preference_no_rate_helps(dtype):
    (said,) = warnings([0.0] * 10, dtype=dtype, norm=0.0)[0]
    assert "since the gradient was 0: no pair had a preference" in said
    assert "`--learning-rate`" not in said


@pytest.mark.parametrize(
    "fractions",
    [
        [1.0] * 20,
        [0.0, 0.9, 0.0],  # adapters: B is 0 in the first step, and A has no gradient
        [0.9] + [0.0] * 20,
        [0.5] * 10,
        [],
    ],
)
def test_enough_changes_in_one_of_the_first_steps(fractions):
    assert warnings(fractions)[1] == []


def test_steps_of_a_warm_up_are_not_judged():
    rates = [1e-6 * min(step / 40, 1) for step in range(60)]
    small_steps = [0.0 if rate < 5e-7 else 1.0 for rate in rates]
    assert warnings(small_steps, rates)[1] == []
    during, said = warnings([0.0] * 60, rates)
    assert during == said
    assert "any of the first 10 steps" in said[0]


def test_a_run_that_ends_early():
    during, said = warnings([0.01] * 3)
    assert during == []
    assert "any of the first 3 steps" in said[0]
