"""Every optimiser of Optax under `make_step`, and what those that ask for more are given."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx.losses import dpo

from .policies import VOCAB, assert_close, random_batch
from .test_devices import LOSSES

pytestmark = pytest.mark.usefixtures("standard_promotion")
BATCH = random_batch()
KEYS = jax.random.split(jax.random.key(0), 4)
POLICY = {"table": jax.random.normal(KEYS[0], (VOCAB, 4)), "scale": jnp.ones(4)}
REFERENCE = {"table": jax.random.normal(KEYS[1], (VOCAB, 4)), "scale": jnp.ones(4)}


def score(policy, batch, *, key=None):
    """A number for each token: the smallest program that trains."""

    def total(tokens):
        ids = jnp.where(tokens.mask, tokens.ids, 0)
        numbers = jnp.tanh(policy["table"][ids] * policy["scale"][None, None]).sum(-1)
        return jnp.where(tokens.mask, numbers, 0).sum(-1)

    return dpx.PairLogProbs(total(batch.chosen), total(batch.rejected), weight=batch.weight)


CORE = (
    "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars "
    "lbfgs lion novograd optimistic_adam_v2 optimistic_gradient_descent polyak_sgd "
    "radam rmsprop rprop sgd sign_sgd signum sm3 yogi"
)
CONTRIB = (
    "acprop ademamix adopt cocob dadapt_adamw galore madgrad momo momo_adam muon prodigy "
    "schedule_free_adamw schedule_free_sgd simplified_ademamix sophia"
)


def sam():
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(0.01), adversary, sync_period=2)


def alias(module, name):
    return lambda: getattr(module, name)(0.01)


ALIASES = {
    **{name: alias(optax, name) for name in CORE.split()},
    **{name: alias(optax.contrib, name) for name in CONTRIB.split()},
    "noisy_sgd": lambda: optax.noisy_sgd(0.01, key=0),
}
WRAPPERS = {
    "dog": lambda: optax.contrib.dog(1.0, init_step=("heuristic", 1e-3)),
    "dowg": lambda: optax.contrib.dowg(1.0),
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(1e-3)),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=2)
    ),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10, store_grad=True)
    ),
    "sam": sam,
    "chained sam": lambda: optax.chain(optax.clip(1.0), optax.GradientTransformation(*sam())),
    "injected": lambda: optax.inject_hyperparams(optax.contrib.momo)(learning_rate=0.1),
    "master weights": lambda: dpx.master_weights(optax.lbfgs()),
}
EVERY = {**ALIASES, **WRAPPERS}
RUN_BY_DEFAULT = {"noisy_sgd", "polyak_sgd", "momo", "reduce_on_plateau", "backtracking", "sophia"}
REASONS = {
    "optimistic_adam": "deprecated by Optax, which has `optimistic_adam_v2`",
    "dpsgd": "needs the gradient of each example, not of the batch",
}


def test_the_table_is_complete():
    found = {
        name
        for module in (optax, optax.contrib)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and "GradientTransformation" in str(inspect.signature(function).return_annotation)
        and next(iter(inspect.signature(function).parameters), "").endswith("learning_rate")
        and not name.startswith(("_", "scale_by_"))
    }
    assert found == {*ALIASES, *REASONS}


@pytest.mark.parametrize("name", EVERY)
def test_a_step_keeps_the_form_of_policy_and_state(name):
    optimizer = EVERY[name]()
    opt_state = optimizer.init(POLICY)
    step = dpx.make_step(dpo, optimizer, score=score)
    policy, new_state, _ = eqx.filter_eval_shape(step, POLICY, opt_state, BATCH, REFERENCE)
    want = jax.tree.map(jax.typeof, (POLICY, opt_state))
    got = jax.tree.map(jax.typeof, (policy, new_state))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in RUN_BY_DEFAULT else pytest.mark.slow) for n in EVERY],
)
def test_three_steps(name):
    """Finite, and every parameter has moved."""
    optimizer = EVERY[name]()
    step = jax.jit(dpx.make_step(dpo, optimizer, score=score))
    policy, opt_state = POLICY, optimizer.init(POLICY)
    for _ in range(3):
        policy, opt_state, metrics = step(policy, opt_state, BATCH, REFERENCE)
    assert np.isfinite(metrics["loss"])
    for leaf_name, leaf in policy.items():
        assert np.isfinite(leaf).all(), leaf_name
        assert (leaf != POLICY[leaf_name]).any(), leaf_name


def recorder(record):
    """Plain gradient descent whose state is `record(params, extra_args)` of the last step."""

    def update(updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g: -0.1 * g, updates), record(params, **extra_args)

    def init(params):
        zero, like = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return (zero, like, zero, like, zero, like, zero)

    return optax.GradientTransformationExtraArgs(init, update)


def asked(params, *, value, grad, value_fn, **_):
    """All that can be asked of the objective, here and at another place."""
    there = jax.tree.map(lambda x: 0.9 * x, params)
    ones = jax.tree.map(jnp.ones_like, params)
    curved = jax.jvp(jax.grad(value_fn), (there,), (ones,))[1]
    slope = jax.jvp(value_fn, (there,), (ones,))[1]
    return value, grad, value_fn(params), jax.grad(value_fn)(there), value_fn(there), curved, slope


CASES = pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        ("coupled", False),
        pytest.param("coupled", True, marks=pytest.mark.slow),
        pytest.param("separable", False, marks=pytest.mark.slow),
        pytest.param("separable", True, marks=pytest.mark.slow),
    ],
)


@CASES
def test_value_gradient_and_function_are_exact(name, check_vma):
    """Over microbatches and devices, as on the whole batch and as JAX differentiates it."""

    loss = LOSSES[name]

    def run(**options):
        optimizer = recorder(asked)
        return dpx.make_step(loss, optimizer, score=score, **options), optimizer.init(POLICY)

    @jax.jit
    def direct(policy):
        ours, theirs = score(policy, BATCH), score(REFERENCE, BATCH)
        return (BATCH.weight * loss(ours, theirs).loss).sum() / BATCH.weight.sum()

    step, state = run()
    _, want, metrics = jax.jit(step)(POLICY, state, BATCH, REFERENCE)
    oracle = recorder(asked).update(
        POLICY, None, POLICY, value=direct(POLICY), grad=jax.grad(direct)(POLICY), value_fn=direct
    )[1]
    assert_close(want, oracle, 1e-12)
    np.testing.assert_allclose(want[0], metrics["loss"], rtol=1e-15)
    step, state = run(axis_name="data", microbatches=2)
    mapped = on_two(step, check_vma)
    assert_close(jax.jit(mapped)(POLICY, state, BATCH, REFERENCE)[1], want, 1e-12)


def on_two(step, check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )


@pytest.mark.slow
@CASES
def test_a_line_search_over_microbatches_and_devices(name, check_vma):
    loss, optimizer = LOSSES[name], optax.lbfgs()

    def three(step):
        step = jax.jit(step)
        policy, state = POLICY, optimizer.init(POLICY)
        for _ in range(3):
            policy, state, metrics = step(policy, state, BATCH, REFERENCE)
        return policy, metrics

    want = three(dpx.make_step(loss, optimizer, score=score))
    options = {"score": score, "microbatches": 2}
    parallel = dpx.make_step(loss, optimizer, axis_name="data", **options)
    assert_close(three(on_two(parallel, check_vma)), want, 1e-9)
    first = dpx.make_eval(loss, score=score)(POLICY, BATCH, REFERENCE).mean()
    assert want[1]["loss"] < first["loss"]


def test_the_function_is_traced_only_if_it_is_called():
    counts = []

    def counted(policy, batch, *, key=None):
        counts[-1] += 1
        return score(policy, batch)

    for optimizer in (optax.sgd(0.1), optax.contrib.momo(0.1), optax.lbfgs()):
        counts.append(0)
        step = dpx.make_step(dpo, optimizer, score=counted)
        eqx.filter_eval_shape(step, POLICY, optimizer.init(POLICY), BATCH, REFERENCE)
    assert counts[0] == counts[1] == 2 < counts[2]


@pytest.mark.slow
def test_under_vmap():
    """A line search for each of two policies at once."""
    optimizer = optax.lbfgs()
    step = dpx.make_step(dpo, optimizer, score=score)

    def advance(policy):
        return step(policy, optimizer.init(policy), BATCH, REFERENCE)[0]

    both = jax.tree.map(lambda x, y: jnp.stack([x, y]), POLICY, REFERENCE)
    got = jax.jit(jax.vmap(advance))(both)
    assert_close(jax.tree.map(lambda x: x[0], got), jax.jit(advance)(POLICY), 1e-9)


@pytest.mark.parametrize("name", ["prodigy", "dog", "dowg", "mechanize", "cocob"])
def test_donation_of_states_that_hold_the_parameters(name):
    """By the documented recipe, whose `snapshot` gives the state buffers of its own."""
    optimizer = EVERY[name]()
    step = dpx.make_step(dpo, optimizer, score=score)

    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        batch, reference = frozen
        return step(policy, opt_state, batch, reference)

    policy = dpx.snapshot(POLICY)
    opt_state = dpx.snapshot(optimizer.init(policy))
    for _ in range(2):
        policy, opt_state, metrics = train((BATCH, REFERENCE), policy, opt_state)
    assert np.isfinite(metrics["loss"])
