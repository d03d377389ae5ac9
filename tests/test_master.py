"""Master weights: narrow parameters that are the rounding of what float32 training learns."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx.losses import dpo

from .policies import Perceptron, arrays, random_batch, statics

pytestmark = pytest.mark.usefixtures("standard_promotion")
BATCH = random_batch(weight=None)
SHAPES = {"weight": (3, 4), "bias": (4,), "wide": (5,)}


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def random_tree(seed, scale=1.0, dtypes=(jnp.bfloat16, jnp.bfloat16, jnp.float32)):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
        for key, dtype, (name, shape) in zip(keys, dtypes, SHAPES.items(), strict=True)
    }


def loop(optimizer, params, steps=20, **extra_args):
    """A user's own loop on gradients that do not depend on the parameters."""

    @jax.jit
    def advance(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for step in range(steps):
        params, state = advance(params, state, cast(random_tree(step), jnp.float32))
    return params, state


def assert_rounded(narrow, wide):
    """Bit for bit, -0 and 0 alike."""
    for x, y in zip(jax.tree.leaves(arrays(narrow)), jax.tree.leaves(arrays(wide)), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y.astype(x.dtype)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "microbatches"), [(1e-6, 2), pytest.param(1e-3, 1, marks=pytest.mark.slow)]
)
def test_two_hundred_steps_are_those_of_float32_parameters(rate, microbatches):
    """At every step the bfloat16 parameters are those of the float32 run, rounded."""
    narrow = cast(Perceptron(jax.random.key(0)), jnp.bfloat16)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))

    def train(policy, optimizer):
        step = dpx.make_step(
            dpo,
            optimizer,
            microbatches=microbatches,
            compute_dtype=jnp.bfloat16,
            update_fraction=True,
        )

        def advance(carry, _):
            params, opt_state = carry
            policy, opt_state, metrics = step(
                eqx.combine(params, statics(narrow)), opt_state, BATCH, narrow
            )
            return (arrays(policy), opt_state), (arrays(policy), metrics)

        carry = arrays(policy), optimizer.init(arrays(policy))
        return jax.jit(lambda carry: jax.lax.scan(advance, carry, length=200)[1])(carry)

    wide_params, wide = train(cast(narrow, jnp.float32), inner)
    params, metrics = train(narrow, dpx.master_weights(inner))
    assert_rounded(params, wide_params)
    np.testing.assert_array_equal(metrics["loss"], wide["loss"])
    assert metrics["loss"][-1] < metrics["loss"][0]
    moved = [(x[-1] != x[0]).mean() for x in jax.tree.leaves(params)]
    assert max(moved) > 0.2


INNER = {
    "sgd": lambda: optax.sgd(1e-3, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
    "prodigy": lambda: optax.contrib.prodigy(1.0),
    "momo": lambda: optax.contrib.momo(1e-3),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "multi": lambda: optax.multi_transform(
        {"a": optax.adam(1e-3), "b": optax.sgd(1e-3)}, {"weight": "a", "bias": "b", "wide": "b"}
    ),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_a_loop_of_your_own_is_that_of_float32_parameters(inner):
    params = random_tree(100)
    params["bias"] = jnp.zeros_like(params["bias"])
    got, state = loop(dpx.master_weights(inner()), params, value=jnp.float32(3))
    wide = optax.with_extra_args_support(inner())
    want, _ = loop(wide, cast(params, jnp.float32), value=jnp.float32(3))
    assert_rounded(got, want)
    assert {name: x.dtype for name, x in got.items()} == {n: x.dtype for n, x in params.items()}
    assert state.master["wide"] is None
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(state.master[name], want[name])


def around(optimizer):
    """Transformations that hold `optimizer` among others."""
    labels = {"weight": "a", "bias": "b", "wide": "a"}
    return {
        "chain": optax.chain(optax.clip(0.5), optimizer(optax.adam(1e-3))),
        "inject": optax.inject_hyperparams(
            lambda learning_rate: optimizer(optax.adam(learning_rate))
        )(1e-3),
        "multi": optax.multi_transform(
            {"a": optimizer(optax.adam(1e-3)), "b": optimizer(optax.sgd(1e-3))}, labels
        ),
        "multisteps": optax.MultiSteps(optimizer(optax.adam(1e-3)), 2).gradient_transformation(),
        "finite": optax.apply_if_finite(optimizer(optax.adam(1e-3)), 3),
    }


@pytest.mark.parametrize("how", around(dpx.master_weights))
def test_inside_other_transformations(how):
    got, _ = loop(around(dpx.master_weights)[how], random_tree(100))
    want, _ = loop(around(lambda inner: inner)[how], cast(random_tree(100), jnp.float32))
    assert_rounded(got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sum_of_parameter_and_update_is_the_rounded_copy(dtype):
    """For steps of every size, to near 0 and through it too, from copies of every size."""
    rng = np.random.default_rng(0)
    count = 200_000
    copy = (rng.normal(size=count) * 2.0 ** rng.integers(-8, 8, count)).astype(np.float32)
    size = 2.0 ** rng.integers(-20, 2, count) * rng.choice([-1, 1], count)
    target = np.where(rng.random(count) < 0.5, copy * size, copy + copy * size).astype(np.float32)
    params = jnp.asarray(copy).astype(dtype)
    optimizer = dpx.master_weights(optax.identity())
    state = eqx.tree_at(lambda s: s.master, optimizer.init(params), jnp.asarray(copy))
    updates, state = optimizer.update(jnp.asarray(target - copy), state, params)
    np.testing.assert_array_equal(state.master, copy + (target - copy))
    # Passing 0 from what rounds up to a power of two: see the comment beside the difference.
    mantissa, _ = np.frexp(np.asarray(params, np.float32))
    exempt = (np.abs(mantissa) == 0.5) & (copy * target < 0)
    assert exempt.mean() < 0.01
    got = np.asarray(optax.apply_updates(params, updates))
    want = np.asarray(state.master.astype(dtype))
    np.testing.assert_array_equal(got[~exempt], want[~exempt])


def test_a_transformation_after_it_is_not_overruled():
    """Half of each update is applied, and the masters go on from where the parameters are."""
    narrow = cast(Perceptron(jax.random.key(0)), jnp.bfloat16)
    move = optax.stateless(lambda _, params: jax.tree.map(lambda p: -p / 2, params))
    optimizer = optax.chain(dpx.master_weights(move), optax.scale(0.5))
    step = eqx.filter_jit(dpx.make_step(dpo, optimizer))
    policy, opt_state, _ = step(narrow, optimizer.init(arrays(narrow)), BATCH, narrow)
    assert_rounded(policy, jax.tree.map(lambda p: 0.75 * p.astype(jnp.float32), arrays(narrow)))
    again, _, _ = step(policy, opt_state, BATCH, narrow)
    assert_rounded(again, jax.tree.map(lambda p: 0.75 * p.astype(jnp.float32), arrays(policy)))


def test_parameters_that_something_else_has_changed_are_followed():
    optimizer = dpx.master_weights(optax.sgd(1e-4))
    _, state = loop(optimizer, random_tree(100))
    moved, gradients = random_tree(7), cast(random_tree(8), jnp.float32)
    updates, _ = optimizer.update(gradients, state, moved)
    want = jax.tree.map(lambda p, g: p.astype(jnp.float32) - 1e-4 * g, moved, gradients)
    assert_rounded(optax.apply_updates(moved, updates), want)


def test_float16_and_its_subnormal_numbers():
    """Spacing 6e-8 near 0: steps of 1e-8 add up all the same."""
    params = {"x": jnp.asarray([1e-7, -5e-6, 0.0, 1.0, 3e-5], jnp.float16)}
    optimizer = dpx.master_weights(optax.sgd(1e-8))
    state, wide = optimizer.init(params), cast(params, jnp.float32)
    gradients = {"x": jnp.ones(5, jnp.float32)}
    for _ in range(30):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        wide = optax.apply_updates(wide, {"x": -1e-8 * gradients["x"]})
        assert_rounded(params, wide)
    assert params["x"].dtype == jnp.float16
    assert (np.asarray(params["x"][:3]) != np.float16([1e-7, -5e-6, 0])).all()


def test_no_buffer_is_held_twice():
    """A donated state must share nothing with the parameters, nor with itself."""
    params = {k: v for k, v in random_tree(0).items() if k != "wide"}
    state = dpx.master_weights(optax.contrib.prodigy(1.0)).init(params)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
    assert len(set(pointers)) == len(pointers)


def test_copies_lie_where_the_parameters_lie():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    params = {
        "a": jax.device_put(jnp.ones((16, 2), jnp.bfloat16), split),
        "b": jax.device_put(jnp.ones(16, jnp.bfloat16), whole),
    }
    optimizer = dpx.master_weights(optax.adam(1e-3))
    state = optimizer.init(params)
    _, after = jax.jit(optimizer.update)(cast(params, jnp.float32), state, params)
    for held in (state, after):
        assert held.master["a"].sharding.is_equivalent_to(split, 2)
        assert held.master["b"].sharding.is_equivalent_to(whole, 1)


def test_under_vmap_and_gradients_through_it():
    optimizer = dpx.master_weights(optax.sgd(0.1))
    params, gradients = random_tree(0), cast(random_tree(1), jnp.float32)

    def after(rate):
        scaled = jax.tree.map(lambda g: rate * g, gradients)
        updates, _ = optimizer.update(scaled, optimizer.init(params), params)
        return updates

    rates = jnp.array([0.5, 2.0], jnp.float32)
    together = jax.vmap(after)(rates)
    for i, rate in enumerate(rates):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), together, after(rate)
        )
    slopes = jax.jacfwd(after)(jnp.float32(1))
    for slope, gradient in zip(*map(jax.tree.leaves, (slopes, gradients)), strict=True):
        # Tangents are rounded as the parameters are, to half of bfloat16's spacing.
        np.testing.assert_allclose(slope, -0.1 * gradient, rtol=2**-8)


def test_parameters_are_needed():
    params = random_tree(0)
    optimizer = dpx.master_weights(optax.sgd(0.1))
    with pytest.raises(
        ValueError, match="`params` must be given to the update of `master_weights`"
    ):
        optimizer.update(params, optimizer.init(params))
