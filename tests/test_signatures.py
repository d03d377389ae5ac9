"""Policies of other signatures: each has a message with a line, and the line repairs it."""

import re
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx import losses

from .policies import VOCAB, Attention, Perceptron, assert_close, random_batch

BATCH = random_batch(pairs=2)
PLAIN = Perceptron(jax.random.key(0))


class Result(NamedTuple):
    hidden: object
    logits: object


class Output:
    """A class that JAX does not know."""

    def __init__(self, logits):
        self.logits = logits


class Wraps(eqx.Module):
    inner: Perceptron

    def __init__(self):
        self.inner = PLAIN


class Tuple(Wraps):
    def __call__(self, ids, key=None):
        return None, self.inner(ids)


class Object(Wraps):
    def __call__(self, ids, key=None):
        return Output(self.inner(ids))


class Named(Wraps):
    def __call__(self, ids, key=None):
        logits = self.inner(ids)
        return Result(logits, logits)


class Mapping(Wraps):
    def __call__(self, ids, key=None):
        return {"hidden": ids, "logits": self.inner(ids)}


class RequiredKey(Wraps):
    def __call__(self, ids, key):
        return self.inner(ids)


class DrawsWithKey(Wraps):
    def __call__(self, ids, *, key):
        jax.random.split(key)
        return self.inner(ids)


class KeyFirst(Wraps):
    def __call__(self, key, ids):
        return self.inner(ids)


class RngSecond(Wraps):
    def __call__(self, tokens, rng):
        return self.inner(tokens)


class BatchAxis(Wraps):
    def __call__(self, ids, *, deterministic=True, key=None):
        rows, _ = ids.shape
        return jnp.stack([self.inner(ids[i]) for i in range(rows)])


class BatchAxisOfTuples(Wraps):
    def __call__(self, input_ids, attention_mask):
        rows, length = input_ids.shape
        assert attention_mask.shape in ((length, length), (rows, length))
        return (jax.vmap(self.inner)(input_ids),)


class LastUnlessTraining(Wraps):
    def __call__(self, ids, train_mode=False, key=None):
        return self.inner(ids) if train_mode else self.inner(ids)[-1:]


class TakesState(Wraps):
    def __call__(self, ids, state):
        return self.inner(ids) + state.get, state


class TakesMask(Wraps):
    def __call__(self, ids, mask):
        assert mask.shape == (ids.size, ids.size)
        return self.inner(ids)


class TakesPaddingMask(Wraps):
    def __call__(self, ids, attention_mask):
        return self.inner(ids * attention_mask.astype(ids.dtype))


class LastOnly(Wraps):
    def __call__(self, ids):
        return self.inner(ids)[-1]


class FixedLength(Wraps):
    positions: jax.Array

    def __init__(self):
        super().__init__()
        self.positions = jnp.zeros(16, jnp.int32)

    def __call__(self, ids):
        return self.inner(ids + self.positions)


class NoKey(Wraps):
    def __call__(self, ids):
        return self.inner(ids)


# The class, and what its message says beside the line.
KINDS = {
    Tuple: "got a tuple of 2",
    Object: "an object of class Output",
    Named: "got a Result of 2",
    Mapping: "an object of class dict",
    RequiredKey: "missing .* argument: 'key'",
    DrawsWithKey: "missing .* argument: 'key'",
    KeyFirst: "missing .* argument: 'ids'",
    RngSecond: "missing .* argument: 'rng'",
    BatchAxis: "ValueError from BatchAxis: not enough values to unpack",
    BatchAxisOfTuples: "missing .* argument: 'attention_mask'",
    TakesMask: "missing .* argument: 'mask'",
    TakesPaddingMask: "missing .* argument: 'attention_mask'",
    LastOnly: r"got \(11,\) in float64 .* runs the model once for each token",
    FixedLength: "The model runs on rows of 16 tokens only",
}


def score(policy, key=None):
    return eqx.filter_jit(dpx.score_pairs)(policy, BATCH, key=key)


def line_of(message):
    return re.search(r"`policy = (dpx\.adapt\(.*?\))`\.", message).group(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_line_of_the_message_repairs_the_policy(kind):
    model = kind()
    with pytest.raises(ValueError, match=rf"`policy\(ids\)` must .*{kind.__name__}") as caught:
        score(model)
    message = str(caught.value)
    assert re.search(KINDS[kind], message), message
    policy = eval(line_of(message), {"dpx": dpx, "jnp": jnp, "jax": jax, "model": model})
    assert_close(score(policy), score(PLAIN), 1e-12)
    assert_close(score(policy, jax.random.key(1)), score(PLAIN), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_message_says_whether_the_reference_was_run(kind):
    grad = eqx.filter_jit(dpx.make_grad(losses.dpo))
    with pytest.raises(ValueError, match=rf"`reference\(ids\)` must .*{kind.__name__}.*dpx\.adapt"):
        grad(PLAIN, BATCH, kind())
    if kind in (RequiredKey, DrawsWithKey):
        return  # as policies these two run if the step has a key
    with pytest.raises(
        ValueError, match=rf"`policy\(ids, key=key\)` .*{kind.__name__}.*dpx\.adapt"
    ):
        grad(kind(), BATCH, PLAIN, key=jax.random.key(0))


def test_the_reference_of_a_comparison():
    with pytest.raises(ValueError, match=r"`reference\(ids\)` must"):
        dpx.compare(PLAIN, Tuple(), BATCH)


def test_a_model_that_returns_all_positions_in_training_only():
    with pytest.raises(ValueError, match="must return logits of shape") as caught:
        score(LastUnlessTraining())
    line = "dpx.adapt(model, lambda model, ids, key: model(ids, train_mode=True, key=key))"
    assert line_of(str(caught.value)) == line


def test_a_state_is_frozen_by_the_line():
    with pytest.raises(ValueError, match=r"missing .* 'state'.*is then frozen") as caught:
        score(TakesState())
    call = "model(ids, state=jax.tree.map(jnp.copy, state))[0]"
    assert f"lambda model, ids, key: {call}" in str(caught.value)


def test_a_policy_without_a_key_is_given_one():
    with pytest.raises(ValueError, match="unexpected keyword argument 'key'") as caught:
        score(NoKey(), jax.random.key(0))
    assert line_of(str(caught.value)) == "dpx.adapt(model, lambda model, ids, key: model(ids))"


def test_dropout_without_a_key():
    """A line with a fixed key would drop the same numbers at each step."""
    policy = Perceptron(jax.random.key(0), rate=0.5)
    with pytest.raises(
        ValueError, match=r"Dropout requires a key.*pass `key=` to the step"
    ) as caught:
        score(policy)
    assert "dpx.adapt" not in str(caught.value)
    assert score(policy, jax.random.key(0)).chosen.shape == (2,)
    assert score(eqx.nn.inference_mode(policy)).chosen.shape == (2,)


def test_a_row_that_is_too_long():
    class Table(Attention):
        def __call__(self, ids):
            return (self.tokens[ids] + self.positions[:9][: ids.size]) @ self.unembedding.T

    with pytest.raises(ValueError, match="runs on 8 tokens, and not on 11: make the rows shorter"):
        score(dpx.adapt(Table(jax.random.key(0)), lambda model, ids, key: model(ids)))


def test_a_model_of_features():
    model = eqx.nn.MLP(4, VOCAB, 8, 1, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"takes a vector of 4 features, .* embedding") as caught:
        score(model)
    assert "shorter" not in str(caught.value)


def test_a_fault_of_the_model_keeps_its_class():
    class Faulty(Wraps):
        def __call__(self, ids):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        score(Faulty())
    notes = "".join(caught.value.__notes__)
    assert r"`policy(ids)` of class Faulty, called with `ids` of shape (11,) in int32" in notes


def test_a_good_policy_is_traced_once_for_each_role():
    traces = []

    class Counting(Perceptron):
        def __call__(self, ids, *, key=None):
            traces.append(ids.shape)
            return super().__call__(ids, key=key)

    policy = Counting(jax.random.key(0))
    eqx.filter_jit(dpx.make_grad(losses.dpo))(policy, BATCH, policy)
    assert len(traces) == 2
    assert np.all(np.array(traces) == VOCAB)
