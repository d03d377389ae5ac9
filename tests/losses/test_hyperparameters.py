"""Hyper-parameters as traced scalars, as grids under `vmap`, per pair, and differentiated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx import losses

from .cases import CASES, NAMES, close, draw, records

table = pytest.mark.parametrize("case", CASES, ids=NAMES)


@table
def test_vmap_over_a_grid_is_a_loop(case):
    """Every hyper-parameter at once, each at three values."""
    p = draw(case)
    policy, reference = records(case, p)
    grid = {name: jnp.asarray([0.9, 1.0, 1.2]) * value for name, value in case.hyper.items()}
    if not grid:
        return
    got = jax.vmap(lambda hyper: case.loss(policy, reference, **hyper).loss)(grid)
    for row in range(3):
        hyper = {name: float(values[row]) for name, values in grid.items()}
        close(got[row], case.oracle(p, **hyper)[0])


@table
@pytest.mark.parametrize("array", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_one_value_per_pair(case, array):
    p = draw(case)
    spread = np.linspace(0.8, 1.3, 6)
    hyper = {name: value * spread for name, value in case.hyper.items()}
    result = case.loss(*records(case, p), **{k: array(v) for k, v in hyper.items()})
    close(result.loss, case.oracle(p, **hyper)[0])


@table
def test_derivatives_with_respect_to_hyperparameters(case):
    """Against central differences of the oracle; 0 where the formula detaches one."""
    p = draw(case)
    policy, reference = records(case, p)

    def total(hyper):
        return case.loss(policy, reference, **hyper).loss.sum()

    slopes = jax.grad(total)({name: jnp.asarray(value) for name, value in case.hyper.items()})
    for name, slope in slopes.items():
        ends = [
            case.oracle(p, **(case.hyper | {name: case.hyper[name] + step}))[0].sum()
            for step in (1e-6, -1e-6)
        ]
        close(slope, 0 if name in case.detached else (ends[0] - ends[1]) / 2e-6, 1e-6)


def test_traced_values_recompile_nothing():
    policy, reference = records(CASES[0], draw(CASES[0]))
    traces = []

    @jax.jit
    def total(beta):
        traces.append(beta)
        return losses.dpo(policy, reference, beta=beta).loss.sum()

    for beta in (0.1, 0.2, 0.3):
        close(total(beta), losses.dpo(policy, reference, beta=beta).loss.sum())
    assert len(traces) == 1


def test_integers_are_numbers():
    policy, reference = records(CASES[0], draw(CASES[0]))
    close(losses.dpo(policy, reference, beta=1).loss, losses.dpo(policy, reference, beta=1.0).loss)


@pytest.mark.parametrize(
    ("loss", "hyper"),
    [
        (losses.cpo, {"alpha": 0}),
        (losses.dpop, {"penalty": 0}),
        (losses.simpo, {"gamma": 0}),
        (losses.r_dpo, {"alpha": 0}),
        (losses.alpha_po, {"alpha": 0}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_terms_that_are_switched_off(loss, hyper):
    """With its own term at 0 each is another loss of the table, exactly."""
    policy, reference = records(CASES[0], draw(CASES[0]))
    plain = {
        losses.cpo: losses.reference_free(losses.dpo),
        losses.dpop: losses.dpo,
        losses.simpo: losses.reference_free(losses.length_normalized(losses.dpo)),
        losses.r_dpo: losses.dpo,
        losses.alpha_po: losses.simpo,
    }[loss]
    extra = {"gamma": 0.3} if loss is losses.alpha_po else {}
    got = loss(policy, reference, beta=0.4, **hyper, **extra)
    want = plain(policy, reference, beta=0.4, **extra)
    close(got.loss, want.loss)
