"""`check_policy` finds each of the planted faults, and no fault in good policies."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses, models
from dpo_eqx._policies.probes import SIMILAR, Probe, differ

from .policies import VOCAB, Attention, Perceptron, Recurrent

KEY = jax.random.key(0)
GOOD = Perceptron(KEY)
COUNT = itertools.count()
RNG = np.random.default_rng(0)


class Faulty(eqx.Module):
    """A good policy with a fault in its inputs or outputs."""

    inner: eqx.Module
    fault: object = eqx.field(static=True)
    extra: jax.Array | None = None

    def __call__(self, ids):
        return self.fault(self, ids)


class Keyed(Faulty):
    dropout: eqx.nn.Dropout = eqx.nn.Dropout(0.5)

    def __call__(self, ids, *, key=None):
        return self.fault(self, ids, key)


class WithRope(Perceptron):
    rope_sin: jax.Array

    def __init__(self):
        super().__init__(KEY)
        self.rope_sin = jnp.sin(jnp.arange(8.0))


class WithPositions(Perceptron):
    position_table: jax.Array

    def __init__(self):
        super().__init__(KEY)
        angles = jnp.arange(8.0)[:, None] / jnp.array([[1.0, 10.0]])
        self.position_table = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)


class WithState(Perceptron):
    norm: eqx.nn.BatchNorm

    def __init__(self):
        super().__init__(KEY)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")


class Fails(Perceptron):
    """Its notes need no call."""

    def __call__(self, ids):
        raise ZeroDivisionError


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_note_on_parameters_in_half_precision(dtype):
    policy = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_array(x) else x, Fails(KEY))
    notes = " ".join(dpx.check_policy(policy).notes)
    assert ("`dpx.master_weights`" in notes) == (dtype != "float32")
    assert ("in half precision: embedding" in notes) == (dtype != "float32")


class Unmasked(Attention):
    def hidden(self, ids, layout, *, key=None):
        x = self.tokens[ids] + self.positions[layout.positions]
        return x + jax.nn.softmax(x @ self.query @ x.T, axis=-1) @ x @ self.value


class Mistaken(Attention):
    """Its plain call adds no bias and has no soft cap."""

    def __call__(self, ids):
        layout = dpx.Layout(jnp.asarray(ids.size), ids.size, ())
        return self.hidden(ids, layout) @ self.unembedding.T


class WrongPositions(Attention):
    """Its fast path numbers the tokens by their place in the row."""

    def hidden(self, ids, layout, *, key=None):
        x = self.tokens[ids] + self.positions[: ids.size]
        scores = jnp.where(layout.mask(), x @ self.query @ x.T, -jnp.inf)
        return x + jax.nn.softmax(scores, axis=-1) @ x @ self.value


def small_embedding():
    class Small(eqx.Module):
        embedding: eqx.nn.Embedding
        head: eqx.nn.Linear

        def __call__(self, ids):
            return jax.vmap(self.head)(jax.vmap(self.embedding)(ids))

    return Small(eqx.nn.Embedding(7, 4, key=KEY), eqx.nn.Linear(4, VOCAB, key=KEY))


def faulty(fault, inner=GOOD, extra=None):
    return Faulty(inner, fault, extra)


def drawn(shape):
    return jnp.asarray(RNG.normal(size=shape))


def with_norm(self, ids):
    """A square root whose derivative at 0 is infinite, behind a `where`."""
    logits = self.inner(ids)
    return logits + jnp.where(logits == logits, 0.0, jnp.sqrt(logits * 0.0))


def dropped(self, ids, key):
    """Draws without a key, too."""
    return self.inner(ids) * (1 + jax.random.normal(key or jax.random.key(next(COUNT)), (1, 1)))


# The policy, and what is said of it.
FAULTS = {
    "roll instead of a shift": (
        faulty(lambda self, ids: self.inner(jnp.stack([ids, jnp.roll(ids, 1)], 1).sum(1) % VOCAB)),
        "not causal",
    ),
    "attention to the right": (Unmasked(KEY), "not causal"),
    "a mean over the row": (
        faulty(lambda self, ids: self.inner(ids) - self.inner(ids).mean(0, keepdims=True)),
        "not causal",
    ),
    "a flipped row": (faulty(lambda self, ids: self.inner(ids[::-1])[::-1]), "not causal"),
    "shifted by one": (
        faulty(lambda self, ids: self.inner(jnp.concatenate([ids[:1] * 0, ids[:-1]]))),
        "do not depend on the token there",
    ),
    "no use of the ids": (faulty(lambda self, ids: self.inner(ids * 0)), "do not depend"),
    "positions from the right": (
        faulty(
            lambda self, ids: self.inner(
                (ids + jnp.arange(ids.size, dtype=ids.dtype)[::-1]) % VOCAB
            )
        ),
        "Padding leaks",
    ),
    "a scale by the width": (faulty(lambda self, ids: self.inner(ids) / ids.size), "Padding leaks"),
    "dropout without a key": (
        faulty(lambda self, ids: self.inner(ids) + eqx.nn.Dropout(0.5)(jnp.ones((1, VOCAB)))),
        "Dropout requires a key",
    ),
    "dropout whose key is not passed on": (
        Keyed(Perceptron(KEY, rate=0.5), lambda self, ids, key: self.inner(ids)),
        "fails in training",
    ),
    "random numbers in evaluation": (Keyed(GOOD, dropped), "Two calls without a key differ"),
    "random numbers of NumPy": (
        faulty(lambda self, ids: self.inner(ids) + drawn((1, VOCAB))),
        "Two calls without a key differ",
    ),
    "a count in Python": (
        faulty(lambda self, ids: self.inner(ids) + next(COUNT)),
        "Two calls without a key differ",
    ),
    "random numbers of NumPy with a key": (
        Keyed(
            GOOD, lambda self, ids, key: self.inner(ids) + (0 if key is None else drawn((1, 11)))
        ),
        "Two calls with one key differ",
    ),
    "a wrong head": (faulty(lambda self, ids: self.inner(ids)[:, :5]), "returns 5 logits .* is 11"),
    "a small embedding": (small_embedding(), "its embedding has 7 rows"),
    "probabilities": (
        faulty(lambda self, ids: jax.nn.softmax(self.inner(ids))),
        "returns probabilities",
    ),
    "integers": (faulty(lambda self, ids: self.inner(ids).astype(int)), "floating-point numbers"),
    "half precision": (
        faulty(lambda self, ids: self.inner(ids).astype(jnp.bfloat16)),
        "The logits are in bfloat16",
    ),
    "a tuple": (faulty(lambda self, ids: (self.inner(ids), None)), r"model\(ids\)\[0\]"),
    "logits that are NaN": (faulty(lambda self, ids: self.inner(ids) * jnp.nan), "NaN or infinite"),
    "a gradient that is NaN": (faulty(with_norm), "The gradient is NaN or infinite at inner"),
    "a trained rotary table": (WithRope(), "tables or masks: rope_sin.*without='rope_sin"),
    "a trained table of positions": (WithPositions(), "tables or masks: position_table"),
    "a trained state": (WithState(), "The state of a layer"),
    "a fast path without its bias": (Mistaken(KEY), "disagree with the plain call"),
    "a fast path with wrong positions": (WrongPositions(KEY), "disagree with the plain call"),
    "a branch on values": (
        faulty(lambda self, ids: self.inner(ids) * (2 if ids[0] > 0 else 1)),
        "TracerBoolConversionError",
    ),
    "one length only": (
        faulty(lambda self, ids: self.inner(ids + jnp.arange(6, dtype=ids.dtype))),
        "runs on 6 tokens, but not on 1",
    ),
    "no parameters": (
        faulty(lambda self, ids: jax.nn.one_hot(ids, VOCAB), inner=eqx.nn.Identity()),
        "No array would be trained",
    ),
    "a class": (Perceptron, "got the class Perceptron"),
}


# Each takes seconds to compile, so most of them are run with the slow tests.
QUICK = {"a tuple", "integers", "a class", "a branch on values", "a wrong head"}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS],
)
def test_a_planted_fault_is_found(name):
    policy, message = FAULTS[name]
    with jax.numpy_rank_promotion("allow"):
        report = dpx.check_policy(policy, VOCAB, length=6)
    assert not report.ok
    with pytest.raises(ValueError, match=f"(?s)must pass `dpx.check_policy`.*{message}"):
        report.raise_if_problems()


def call(model, ids, key):
    return model(ids, key=key)


GOOD_ONES = {
    "perceptron": GOOD,
    "dropout": Perceptron(KEY, rate=0.5),
    "recurrent": Recurrent(KEY),
    "bfloat16": Perceptron(KEY, dtype=jnp.bfloat16),
    "fast": Attention(KEY),
    "adapted": dpx.adapt(Perceptron(KEY, rate=0.5), call),
    "transformer": models.Transformer(
        models.Config(vocab=VOCAB, width=8, heads=2, layers=1), key=KEY
    ),
}


@pytest.mark.parametrize(
    "name",
    [n if n == "adapted" else pytest.param(n, marks=pytest.mark.slow) for n in GOOD_ONES],
)
def test_a_good_policy_has_no_problem(name):
    report = dpx.check_policy(GOOD_ONES[name], length=6)
    assert report.problems == ()
    assert report.ok
    report.raise_if_problems()
    assert "no problem" in str(report)
    count = sum(x.size for x in jax.tree.leaves(eqx.filter(GOOD_ONES[name], eqx.is_inexact_array)))
    assert f"{count:,} parameters" in str(report)
    needs_key = name in ("dropout", "adapted")
    assert ("It needs a `key` in training" in str(report)) == needs_key


@pytest.mark.slow
def test_a_frozen_table_is_no_problem():
    policy = WithRope()
    trainable = dpx.trainable(policy, without="rope_sin$")
    report = dpx.check_policy(policy, length=6, trainable=trainable)
    assert report.ok
    assert "rope_sin" not in str(report)


def test_the_length_must_be_four():
    with pytest.raises(ValueError, match="`length` must be at least 4; got 3"):
        dpx.check_policy(GOOD, length=3)


class WithNumPy(eqx.Module):
    """Its parameters are NumPy's. The embedding is indexed, which NumPy cannot do with tracers."""

    embedding: np.ndarray
    head: np.ndarray
    bias: jax.Array
    shift: np.ndarray
    scale: float = 1.0

    def __init__(self):
        rng = np.random.default_rng(0)
        self.embedding = rng.normal(size=(VOCAB, 4))
        self.head = rng.normal(size=(4, VOCAB))
        self.bias = jnp.zeros((1, VOCAB))
        self.shift = np.zeros(1, np.int32)

    def __call__(self, ids):
        return self.scale * self.embedding[(ids + self.shift) % VOCAB] @ self.head + self.bias


def changed_by_a_step(policy, trainable):
    """The paths of the leaves that one step of SGD changes."""
    rng, mask = np.random.default_rng(0), np.ones((2, 3), bool)
    batch = dpx.PreferenceBatch(
        *(dpx.Tokens(rng.integers(0, VOCAB, mask.shape), mask) for _ in range(3))
    )
    optimizer = optax.sgd(1.0)
    step = eqx.filter_jit(dpx.make_step(losses.dpo, optimizer, trainable=trainable))
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    trained, _, _ = step(policy, opt_state, batch, dpx.snapshot(policy))
    before, after = map(jax.tree_util.tree_leaves_with_path, (policy, trained))
    pairs = zip(before, after, strict=True)
    return {path[-1].name for (path, old), (_, new) in pairs if not np.array_equal(old, new)}


@pytest.mark.parametrize("without", [None, "embedding"])
def test_the_report_lists_what_a_step_trains(without):
    """NumPy arrays, too, because `eqx.is_inexact_array` selects them."""
    policy = WithNumPy()
    trainable = dpx.trainable(policy, without=without)
    report = dpx.check_policy(policy, VOCAB, length=4, trainable=trainable)
    assert report.problems == ()
    assert {array.path for array in report.trained} == changed_by_a_step(policy, trainable)
    named = "head" if without else "embedding, head"
    assert f"NumPy arrays are trained as JAX arrays are: {named}. If" in str(report)


def test_a_report_passes_no_protocol_that_is_not_offered():
    report = dpx.check_policy(WithNumPy(), VOCAB, length=4)
    assert not {"the fast path", "start and extend"} & set(report.passed)
    assert "It offers neither `FastPolicy` nor `RecurrentPolicy`" in str(report)


def test_numpy_parameters_in_float64_compute_in_float32():
    ids, logits = np.arange(4), np.ones((4, VOCAB))
    with jax.enable_x64(False):
        policy = eqx.tree_at(lambda policy: policy.bias, WithNumPy(), np.zeros((1, VOCAB)))
        probe = Probe(policy, ids, VOCAB, KEY, False, eqx.is_inexact_array)
        assert not differ(probe, logits, logits + 1e-6, SIMILAR)
        assert differ(probe, logits, logits + 1e-2, SIMILAR)
