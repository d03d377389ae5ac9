"""Derivatives of any order, in either mode: what they may hold, and fast policies as plain ones."""

import math
import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import models
from dpo_eqx._head import tiling
from dpo_eqx._jax.linear_map import share, sum_parts, with_transpose
from dpo_eqx.models._decoder import attention, blockwise

from .policies import Attention, Plain, assert_close, random_batch


@jax.custom_jvp
def sine(weight, hidden):
    return jnp.sin(hidden @ weight.T).sum(axis=-1)


@sine.defjvp
def _sine_jvp(primals, tangents):
    weight, hidden = primals

    def push(tangents):
        in_weight, in_hidden = tangents
        moved = in_hidden @ weight.T + hidden @ in_weight.T
        return (jnp.cos(hidden @ weight.T) * moved).sum(axis=-1)

    def pull(cotangent):
        slopes = jnp.cos(hidden @ weight.T) * cotangent[:, None]
        return slopes.T @ hidden, slopes @ weight

    result = sine(weight, hidden)
    return result, with_transpose(push, pull, tangents, result)


@pytest.mark.slow  # compiles derivatives of derivatives
def test_three_orders_in_both_modes_and_under_transformations():
    weight, hidden = (jnp.cos(7.0 * jnp.arange(n * 3.0).reshape(n, 3)) for n in (4, 5))
    both = jnp.stack([hidden, 2 * hidden])

    def scanned(weight):
        def body(total, hidden):
            return total + sine(weight, hidden), None

        return jax.lax.scan(jax.checkpoint(body), jnp.zeros(5), both)[0]

    check = partial(jax.test_util.check_grads, modes=("fwd", "rev"))
    check(jax.jit(sine), (weight, hidden), order=3)
    # With one of the two fixed: JAX transposes a linear solve only if all of it is differentiated.
    check(jax.jit(jax.vmap(lambda x: sine(weight, x))), (both,), order=2)
    check(jax.jit(scanned), (weight,), order=2)


@pytest.mark.slow
def test_a_gradient_is_differentiated_in_what_scales_it():
    """As in the `beta` of a loss: the operands stay, only the cotangents move."""
    weight, hidden = (jnp.cos(7.0 * jnp.arange(n * 3.0).reshape(n, 3)) for n in (4, 5))

    def scaled(slopes):
        return jax.grad(lambda w, x: jnp.vdot(slopes, sine(w, x)), (0, 1))(weight, hidden)

    slopes = jnp.arange(1.0, 6.0)
    got = jax.jvp(scaled, (jnp.ones(5),), (slopes,))[1]
    assert_close(got, scaled(slopes), 1e-14)

    def total(slopes):
        return sum(x.sum() for x in scaled(slopes))

    np.testing.assert_allclose(jnp.vdot(jax.grad(total)(slopes), slopes), total(slopes))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_sum_of_parts_is_differentiated_inside_whatever_is_tracked(check_vma):
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    weight, x = jnp.arange(1.0, 9.0), jnp.array(3.0)

    def inside(weight, x):
        def cube(weight, x):
            if check_vma:
                x = jax.lax.pcast(x, "tensor", to="varying")
            shared = share(x, "tensor", weight)
            return sum_parts((weight * shared).sum(), "tensor", weight) ** 3

        return jax.grad(cube, 1)(weight, x), jax.jvp(
            lambda x: jax.grad(cube, 1)(weight, x), (x,), (x,)
        )[1]

    specs = P("tensor"), P()
    mapped = jax.shard_map(inside, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    # Compiled: XLA does not compile an empty array by itself inside a `shard_map`.
    got = jax.jit(mapped)(weight, x)
    np.testing.assert_allclose(got, [3 * 36**3 * 9, 6 * 36**3 * 9], rtol=1e-13)


def _log_probs(hidden, unembedding):
    targets = jnp.zeros(64, jnp.int32)
    return dpx.linear_token_log_probs(hidden, unembedding, targets, chunk_size=2)


def _attend(query, key, value):
    config = models.Config(vocab=1, width=1, layers=1, heads=4, key_heads=2, head_width=2)
    return attention.attend(query, key, value, None, config=config)


# Of 64 tokens and 512 of a vocabulary all logits are 32768; all scores of 4 heads 16384.
CASES = {
    "log_probs": (_log_probs, [(64, 5), (512, 5)], 2560),
    "kl": (partial(dpx.linear_kl, chunk_size=2), [(64, 5), (512, 5), (64, 3), (512, 3)], 2560),
    "attention": (_attend, [(1, 64, 4, 2), (1, 64, 2, 2), (1, 64, 2, 2)], 512),
}


@pytest.mark.parametrize("case", CASES)
def test_no_derivative_holds_all_logits_or_scores(monkeypatch, case):
    monkeypatch.setitem(tiling.LOGITS_AT_ONCE, "cpu", 64)
    monkeypatch.setitem(blockwise.SCORES_AT_ONCE, "cpu", 64)
    function, shapes, most = CASES[case]
    operands = tuple(jnp.ones(shape) for shape in shapes)
    wanted = tuple(range(len(operands)))

    def squares(*operands):
        return (function(*operands) ** 2).sum()

    gradient = jax.grad(squares, wanted)

    def slope(*operands):
        return sum(map(jnp.vdot, gradient(*operands), operands))

    for derivative in (
        gradient,
        lambda *x: jax.jvp(function, x, x),
        lambda *x: jax.jvp(gradient, x, x),
        jax.grad(slope, wanted),
    ):
        text = jax.jit(derivative).lower(*operands).as_text()
        shapes = re.findall(r"tensor<([0-9x]+)xf\d+>", text)
        assert max(math.prod(map(int, shape.split("x"))) for shape in shapes) == most


def _squared_margin(policy, reference, **_):
    margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
    return dpx.PairLoss(0.5 * margin**2, margin, margin)


def _transformer():
    config = models.Config(vocab=11, width=8, layers=1, heads=2, attention_softcap=3.0)
    policy = models.Transformer(config, key=jax.random.key(0))
    return jax.tree.map(lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, policy)


POLICIES = {"fast": lambda: Attention(jax.random.key(0)), "transformer": _transformer}


def test_hessians_of_a_transformer():
    """Its layers are a scan, whose transpose has the attention without its `custom_jvp`."""
    policy = _transformer()
    arrays, static = eqx.partition(policy, eqx.is_inexact_array)
    flat, unflatten = ravel_pytree(arrays)
    along = jnp.cos(7.0 * jnp.arange(float(flat.size)))

    @jax.jit
    def slope(flat):
        def total(flat):
            log_probs = jax.nn.log_softmax(eqx.combine(unflatten(flat), static)(jnp.arange(4)))
            return log_probs[:, 3].sum()

        return jax.grad(total)(flat)

    @jax.jit
    def products(flat):
        forward = jax.jvp(slope, (flat,), (along,))[1]
        return forward, jax.grad(lambda flat: slope(flat) @ along)(flat)

    # Central differences of fourth order.
    near, far = (slope(flat + step * along) - slope(flat - step * along) for step in (1e-5, 2e-5))
    want = (8 * near - far) / 12e-5
    assert abs(want).max() > 0.1
    for got in products(flat):
        np.testing.assert_allclose(got, want, atol=1e-8 * abs(want).max())


@pytest.mark.parametrize("policy", ["fast", pytest.param("transformer", marks=pytest.mark.slow)])
def test_derivatives_at_the_reference_are_those_of_a_plain_policy(policy):
    """Where every slope is exactly 0: Hessian-vector products there are Fisher-vector products."""
    policy, batch = POLICIES[policy](), random_batch(pairs=2)
    arrays, static = eqx.partition(policy, eqx.is_inexact_array)
    along = jax.tree.map(
        lambda x: jnp.cos(7.0 * jnp.arange(float(x.size))).reshape(x.shape), arrays
    )

    def dot(tree):
        return sum(map(jnp.vdot, jax.tree.leaves(tree), jax.tree.leaves(along)))

    def derivatives(wrap):
        def score(arrays):
            scored = dpx.score_pairs(wrap(eqx.combine(arrays, static)), batch)
            return scored.chosen - scored.rejected

        def gradient(arrays):
            policy = wrap(eqx.combine(arrays, static))
            found = dpx.make_grad(_squared_margin)(policy, batch, jax.lax.stop_gradient(wrapped))
            return jax.tree.leaves(eqx.filter(found[0], eqx.is_inexact_array))

        def of(arrays):
            moved = jax.jvp(score, (arrays,), (along,))[1]
            fisher = jax.vjp(score, arrays)[1](moved * batch.weight / batch.weight.sum())
            return (
                moved,
                jax.tree.leaves(fisher),
                jax.jvp(gradient, (arrays,), (along,))[1],
                jax.tree.leaves(jax.grad(lambda x: dot(gradient(x)))(arrays)),
            )

        wrapped = wrap(policy)
        return jax.jit(of)(arrays)

    got, want = derivatives(lambda policy: policy), derivatives(Plain)
    assert max(np.abs(x).max() for x in want[1]) > 0.1
    assert_close(got, want, 1e-9)
    assert_close(got[2], got[1], 1e-9)
    assert_close(got[3], got[1], 1e-9)
