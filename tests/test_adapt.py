"""Adapted models: they are policies, and by leaves and paths they are the models."""

import io
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx._jax.inference_mode import in_inference

from .policies import Attention, Perceptron, arrays, assert_close, random_batch

BATCH = random_batch(pairs=4)
MODEL = Perceptron(jax.random.key(0), rate=0.5)
SGD = optax.sgd(0.1)


def call(model, ids, key):
    return model(ids, key=key)


def call_attention(model, ids, key):
    return model(ids)


def run_hidden(model, ids, layout, key):
    return model.hidden(ids, layout)


POLICY = dpx.adapt(MODEL, call)


def paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize(
    "model",
    [MODEL, (MODEL, 1.0), {"a": MODEL, "b": [jnp.ones(2), None]}, jnp.ones(2), None],
    ids=["module", "tuple", "dict", "array", "none"],
)
def test_leaves_are_those_of_the_model(model):
    policy = dpx.adapt(model, call)
    assert isinstance(policy, eqx.Module)
    for got, want in zip(jax.tree.leaves(policy), jax.tree.leaves(model), strict=True):
        assert got is want
    assert jax.tree.structure(policy) == jax.tree.structure(dpx.adapt(model, call))
    rebuilt = jax.tree.map(lambda x: x, policy)
    assert rebuilt.call is call
    assert eqx.tree_equal(rebuilt.model, model)
    if not eqx.is_array(model):
        assert paths(policy) == paths(model)


def test_a_step_is_that_of_the_model():
    step = eqx.filter_jit(dpx.make_step(losses.dpo, SGD))
    key = jax.random.key(1)
    want, _, metrics = step(MODEL, SGD.init(arrays(MODEL)), BATCH, MODEL, key=key)
    policy, _, got = step(POLICY, SGD.init(arrays(POLICY)), BATCH, MODEL, key=key)
    assert_close(policy.model, want, 1e-12)
    np.testing.assert_allclose(got["loss"], metrics["loss"], rtol=1e-12)


def test_the_reference_is_called_without_a_key_and_in_inference():
    keys = []

    def watched(model, ids, key):
        keys.append((key is None, model.dropout.inference))
        return model(ids, key=key)

    policy = dpx.adapt(MODEL, watched)
    grad = dpx.make_grad(losses.dpo)
    eqx.filter_eval_shape(grad, policy, BATCH, policy, key=jax.random.key(1))
    assert sorted(keys) == [(False, False), (True, True)]


def test_flags_files_and_surgery():
    assert in_inference(POLICY).model.dropout.inference is True
    assert eqx.nn.inference_mode(POLICY).model.dropout.inference is True
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, MODEL)
    file.seek(0)
    like = dpx.adapt(Perceptron(jax.random.key(5), rate=0.5), call)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(file, like), POLICY)
    zeroed = eqx.tree_at(lambda p: p.model.embedding, POLICY, replace_fn=jnp.zeros_like)
    assert not zeroed.model.embedding.any()
    assert POLICY.model.embedding.any()


def test_adapters_of_lora_and_their_files(tmp_path):
    key = jax.random.key(1)
    got = models.add_lora(POLICY, rank=2, key=key)
    want = models.add_lora(MODEL, rank=2, key=key)
    assert_close(got.model, want, 1e-15)
    assert paths(eqx.filter(got, models.lora_filter(got))) == paths(
        eqx.filter(want, models.lora_filter(want))
    )
    assert eqx.tree_equal(models.without_lora(got), POLICY)
    assert eqx.tree_equal(models.merge_lora(got).model, models.merge_lora(want))


def test_rules_of_sharding_name_the_paths_of_the_model():
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    rules = {r"^mlp\.layers\.0\.weight$": P("fsdp", "tensor")}
    sharded = sharding.shard_policy(POLICY, mesh, rules=rules)
    assert sharded.model.mlp.layers[0].weight.sharding.spec == P("fsdp", "tensor")


def test_donation():
    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        step = dpx.make_step(losses.dpo, SGD)
        return step(policy, opt_state, *frozen, key=jax.random.key(0))

    policy = dpx.snapshot(POLICY)
    policy, _, metrics = train((BATCH, MODEL), policy, SGD.init(arrays(policy)))
    assert np.isfinite(metrics["loss"])
    assert policy.call is call


def _parts_of_head(linear):
    return linear.weight, linear.bias


@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True])
def test_with_hidden_it_is_a_fast_policy_and_equals_the_plain_call(bias):
    model = Attention(jax.random.key(0), bias=bias, softcap=None)

    def head(model):
        linear = eqx.nn.Linear(8, 11, use_bias=bias, key=jax.random.key(0))
        parts = model.unembedding, model.unembedding_bias
        return eqx.tree_at(_parts_of_head, linear, parts, is_leaf=lambda x: x is None)

    fast = dpx.adapt(model, call_attention, hidden=run_hidden, unembedding=head)
    plain = dpx.adapt(model, call_attention)
    assert isinstance(fast, dpx.FastPolicy)
    assert not isinstance(plain, dpx.FastPolicy)
    score = eqx.filter_jit(dpx.score_pairs)
    assert_close(score(fast, BATCH), score(plain, BATCH), 1e-10)
    grad = eqx.filter_jit(dpx.make_grad(losses.dpo))
    (got, _), (want, _) = grad(fast, BATCH, plain), grad(plain, BATCH, plain)
    assert_close(got.model, want.model, 1e-10)


def test_an_unembedding_may_be_an_array():
    model = Attention(jax.random.key(0), bias=False, softcap=None)
    fast = dpx.adapt(
        model, call_attention, hidden=run_hidden, unembedding=lambda model: model.unembedding
    )
    assert fast.unembedding is model.unembedding
    assert fast.unembedding_bias is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"call": None}, "`call` must be a function .*got None"),
        ({"call": call, "hidden": run_hidden}, "got only `hidden`. Give `unembedding` as well"),
        ({"call": call, "unembedding": call}, "got only `unembedding`. Give `hidden` as well"),
        ({"call": call, "hidden": 1, "unembedding": call}, "`hidden` must be a function .*got 1"),
    ],
)
def test_what_is_no_call(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        dpx.adapt(MODEL, **options)


class Normed(eqx.Module):
    inner: Perceptron
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.inner = Perceptron(jax.random.key(0))
        self.norm = eqx.nn.BatchNorm(11, "batch", mode="batch")

    def __call__(self, ids, state):
        logits = self.inner(ids)
        normed, state = jax.vmap(self.norm, in_axes=(0, None), out_axes=(0, None))(logits, state)
        return normed, state


def test_a_state_is_held_frozen():
    model, state = eqx.nn.make_with_state(Normed)()
    model = eqx.nn.inference_mode(model)
    before = [np.asarray(x) for x in jax.tree.leaves(state)]
    policy = dpx.adapt(model, lambda model, ids, key: model(ids, state)[0])
    step = eqx.filter_jit(dpx.make_step(losses.sft, SGD))
    trained, _, metrics = step(policy, SGD.init(eqx.filter(policy, eqx.is_inexact_array)), BATCH)
    assert np.isfinite(metrics["loss"])
    assert not np.array_equal(trained.model.norm.weight, model.norm.weight)
    for x, y in zip(jax.tree.leaves(state), before, strict=True):
        np.testing.assert_array_equal(x, y)


class Counter(eqx.nn.StatefulLayer):
    """Counts its calls in the state."""

    count: eqx.nn.StateIndex

    def __init__(self):
        self.count = eqx.nn.StateIndex(jnp.asarray(0))

    def __call__(self, x, state, *, key=None):
        return x, state.set(self.count, state.get(self.count) + 1)


def test_a_state_that_each_call_updates_is_copied():
    """Equinox refuses a state that a call has updated before, and `Sequential` hides its need."""
    model, state = eqx.nn.make_with_state(
        lambda: eqx.nn.Sequential([Counter(), eqx.nn.Lambda(Perceptron(jax.random.key(0)))])
    )()
    with pytest.raises(ValueError, match=r"must take the ids .*dpx\.adapt") as caught:
        dpx.score_pairs(model, BATCH)
    line = re.search(r"policy = (dpx\.adapt\(model, .*?\[0\]\))`", str(caught.value))
    policy = eval(line[1], {"dpx": dpx, "jax": jax, "jnp": jnp, "model": model, "state": state})
    first, second = (dpx.score_pairs(policy, BATCH).chosen for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_state_within_the_policy_is_refused():
    model, state = eqx.nn.make_with_state(Normed)()
    policy = dpx.adapt((model, state), lambda both, ids, key: both[0](ids, both[1])[0])
    with pytest.raises(ValueError, match=r"must not select an `eqx.nn.State`.*dpx.adapt"):
        dpx.make_grad(losses.sft)(policy, BATCH)
