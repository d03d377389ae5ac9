"""A `vmap` that runs a few calls at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_eqx._jax.in_turns import in_turns

RNG = np.random.default_rng(0)
ONE, OTHER = jnp.asarray(RNG.normal(size=(6, 2))), jnp.asarray(RNG.normal(size=(3, 6, 2)))


def both(one, other):
    """Results of two shapes, which depend on all of their operands."""
    return one * other.sum(), {"scaled": other * one[0]}


def of_each(most):
    # Calls along the first axis of one operand, and along the last but one of the other.
    return in_turns(both, most, [0, 1])(ONE, OTHER)


@pytest.mark.parametrize(
    ("most", "turns"), [(np.inf, 0), (9.0, 0), (6.0, 0), (2.0, 3), (1.0, 6), (0.1, 6)]
)
def test_it_is_the_vmap(most, turns):
    want = jax.vmap(both, (0, 1))(ONE, OTHER)
    jax.tree.map(np.testing.assert_array_equal, of_each(most), want)
    loops = [
        e.params["length"]
        for e in jax.make_jaxpr(lambda: of_each(most))().eqns
        if "length" in e.params
    ]
    assert loops == [turns] * (turns > 0)


def test_an_operand_without_the_axis_and_another_place_of_the_results():
    got = in_turns(both, 2.0, [None, 1], out_axes=1)(ONE[0], OTHER)
    want = jax.vmap(both, (None, 1), out_axes=1)(ONE[0], OTHER)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_symbolic_number_of_calls_runs_at_once():
    (calls,) = jax.export.symbolic_shape("calls")
    shape = jax.ShapeDtypeStruct((calls, 2), ONE.dtype)
    exported = jax.export.export(jax.jit(lambda x: in_turns(jnp.sum, 1.0, [0])(x)))(shape)
    np.testing.assert_allclose(exported.call(ONE), ONE.sum(1))
