"""Complex parameters: what `make_grad` returns is what an optimiser may subtract."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx._jax.dtypes import cast, in_dtype, in_dtypes_of, in_float32_at_least, is_narrow
from dpo_eqx.losses import dpo

from .policies import VOCAB, assert_close, random_batch
from .test_devices import LOSSES, MESH

BATCH = random_batch(pairs=16)


class Complex(eqx.Module):
    """A table, and a linear recurrence with complex decay, as an LRU has it."""

    table: jax.Array
    decay: jax.Array
    head: jax.Array

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.table = jax.random.normal(a, (VOCAB, 3), jnp.complex128)
        self.decay = 0.5 * jax.random.normal(b, (3,), jnp.complex128)
        self.head = jax.random.normal(c, (VOCAB, 3))

    def __call__(self, ids):
        x = self.table[ids]
        before = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
        return jnp.real(x + self.decay[None] * before) @ self.head.T


POLICY, REFERENCE = Complex(jax.random.key(0)), Complex(jax.random.key(1))


def parts(policy):
    """Real and imaginary parts, as real parameters."""
    return (policy.table.real, policy.table.imag, policy.decay.real, policy.decay.imag, policy.head)


def whole(parts):
    table, decay = jax.lax.complex(*parts[:2]), jax.lax.complex(*parts[2:4])
    return eqx.tree_at(lambda p: (p.table, p.decay, p.head), POLICY, (table, decay, parts[4]))


def in_parts(policy):
    """The gradient of the same objective with respect to real numbers alone."""
    gradients, metrics = dpx.make_grad(
        dpo, score=lambda p, batch, *, key: dpx.score_pairs(whole(p), batch, key=key)
    )(parts(policy), BATCH, parts(REFERENCE))
    return gradients, metrics


def test_finite_differences_in_both_parts():
    gradients, metrics = eqx.filter_jit(dpx.make_grad(dpo))(POLICY, BATCH, REFERENCE)
    evaluate = eqx.filter_jit(dpx.make_eval(dpo))

    def loss(policy):
        return evaluate(policy, BATCH, REFERENCE).mean()["loss"]

    for unit in (1e-5, 1e-5j):
        for get, index in ((lambda p: p.table, (3, 1)), (lambda p: p.decay, (2,))):
            up, down = (
                loss(eqx.tree_at(get, POLICY, get(POLICY).at[index].add(sign * unit)))
                for sign in (1, -1)
            )
            part = get(gradients)[index].imag if unit.imag else get(gradients)[index].real
            np.testing.assert_allclose(part, (up - down) / 2e-5, rtol=1e-6, atol=1e-10)
    assert_close(eqx.filter_jit(in_parts)(POLICY), (parts(gradients), metrics), 1e-12)


@pytest.mark.parametrize("name", [pytest.param("separable", marks=pytest.mark.slow), "coupled"])
def test_microbatches_and_devices(name):
    loss = LOSSES[name]
    want, metrics = eqx.filter_jit(dpx.make_grad(loss))(POLICY, BATCH, REFERENCE)
    split = eqx.filter_jit(dpx.make_grad(loss, microbatches=4))(POLICY, BATCH, REFERENCE)
    mapped = jax.shard_map(
        dpx.make_grad(loss, axis_name="data"),
        mesh=MESH,
        in_specs=(P(), P("data"), P()),
        out_specs=P(),
    )
    for got in (split, jax.jit(mapped)(POLICY, BATCH, REFERENCE)):
        assert_close((parts(got[0]), got[1]), (parts(want), metrics), 1e-9)


DECAYED = optax.chain(
    optax.clip_by_global_norm(0.01), optax.add_decayed_weights(0.1), optax.sgd(0.5)
)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(DECAYED, id="clipped and decayed"),
        pytest.param(optax.sgd(0.5), id="sgd", marks=pytest.mark.slow),
        pytest.param(optax.lbfgs(), id="lbfgs", marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_of_real_parameters(optimizer, standard_promotion):
    """Norm, clipping, decay and a line search see both parts of each number."""

    def score(p, batch, *, key):
        return dpx.score_pairs(whole(p), batch, key=key)

    def two_steps(step, policy, reference):
        state = optimizer.init(eqx.filter(policy, eqx.is_inexact_array))
        step = eqx.filter_jit(step)
        for _ in range(2):
            policy, state, metrics = step(policy, state, BATCH, reference)
        return policy, metrics

    got, metrics = two_steps(dpx.make_step(dpo, optimizer), POLICY, REFERENCE)
    step = dpx.make_step(dpo, optimizer, score=score)
    want = two_steps(step, parts(POLICY), parts(REFERENCE))
    assert_close((parts(got), metrics), want, 1e-9)


def test_casts_keep_imaginary_parts():
    def dtypes(tree):
        return [str(x.dtype) for x in tree]

    tree = [jnp.ones(2, d) for d in ("float32", "float64", "complex64", "complex128", "int32")]
    narrow = [jnp.bfloat16, jnp.bfloat16, jnp.complex64, jnp.complex64, jnp.int32]
    assert dtypes(in_dtype(tree, jnp.bfloat16)) == [jnp.dtype(d).name for d in narrow]
    assert dtypes(in_dtype(tree, jnp.float64)) == ["float64"] * 2 + ["complex128"] * 2 + ["int32"]
    assert dtypes(in_float32_at_least(tree)) == dtypes(tree)
    assert not is_narrow(tree)
    value = jnp.asarray(1 + 2j)
    assert in_dtypes_of([value], [jnp.zeros((), jnp.float32)])[0] == 1 + 2j
    assert cast(value, jnp.complex64).dtype == jnp.complex64
    moved = dpx.sync_reference([value], [jnp.asarray(3 - 4j)], 0.5)
    assert moved[0] == 2 - 1j
    evaluate = eqx.filter_jit(dpx.make_eval(dpo, compute_dtype=jnp.float32))
    loss = evaluate(POLICY, BATCH, REFERENCE).mean()["loss"]
    exact = eqx.filter_jit(dpx.make_eval(dpo))(POLICY, BATCH, REFERENCE).mean()["loss"]
    np.testing.assert_allclose(loss, exact, rtol=1e-5)
