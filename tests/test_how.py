"""The ways to run all rows: by `vmap`, in a loop, and as a batch. All have the same result."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import dpo_eqx as dpx
from dpo_eqx import losses

from .policies import VOCAB, Attention, Perceptron, assert_close, random_batch
from .recurrent_policies import LRU
from .test_packed import PACKED
from .test_score import gappy

KEY = jax.random.key(0)
BATCH = gappy(random_batch(2, pairs=4))
PLAIN = Perceptron(KEY)


# The identity, without a rule for `vmap`.
alone = Primitive("alone")
alone.def_abstract_eval(lambda x: x)
alone.def_impl(lambda x: x)
mlir.register_lowering(alone, lambda ctx, x: [x])
ad.deflinear2(alone, lambda cotangent, _: [alone.bind(cotangent)])


class Unmappable(eqx.Module):
    """A policy that runs on one row at a time, outside of `vmap` alone."""

    inner: Perceptron

    def __call__(self, ids, *, key=None):
        return alone.bind(self.inner(ids, key=key))


class Batched(eqx.Module):
    """A policy that takes a batch, and nothing else."""

    inner: Perceptron

    def __call__(self, ids, *, key=None):
        rows, _ = ids.shape
        keys = None if key is None else jax.random.split(key, rows)
        return jax.vmap(lambda ids, key: self.inner(ids, key=key))(ids, keys)


def objective(policy, batch, how):
    scored = dpx.score_pairs(policy, batch, confidence=True, how=how)
    return (jnp.arange(4.0) * (scored.chosen - 2 * scored.rejected)).sum(), scored


value_and_grad = eqx.filter_jit(eqx.filter_value_and_grad(objective, has_aux=True))
WAYS = {
    "map": (Unmappable(PLAIN), "map"),
    "batch": (Batched(PLAIN), "batch"),
}


@pytest.fixture(scope="module")
def wanted():
    return value_and_grad(PLAIN, BATCH, "vmap")


@pytest.mark.parametrize("way", WAYS)
def test_scores_and_gradients_are_those_of_vmap(way, wanted):
    policy, how = WAYS[way]
    (_, got), gradient = value_and_grad(policy, BATCH, how)
    assert_close(got, wanted[0][1], 1e-12)
    assert_close(gradient.inner, wanted[1], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Attention(KEY), LRU(KEY)], ids=["fast", "lru"])
def test_rows_of_hidden_states_one_after_the_other(policy):
    got, want = (value_and_grad(policy, BATCH, how) for how in ("map", "vmap"))
    assert_close(got, want, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_other_scores(way):
    policy, how = WAYS[way]
    kl = dpx.Tokens(np.ones((4, 3), int), np.ones((4, 3), bool))
    unpaired = dpx.UnpairedBatch(BATCH.prompt, BATCH.chosen, np.arange(4) < 2, kl=kl)
    got = dpx.score_unpaired(policy, unpaired, how=how)
    assert_close(got, dpx.score_unpaired(PLAIN, unpaired), 1e-12)
    got = dpx.ld_score(0.5)(policy, BATCH, how=how)
    assert_close(got, dpx.ld_score(0.5)(PLAIN, BATCH), 1e-12)


@pytest.mark.slow
def test_packed_rows_one_after_the_other():
    policy, batch = Attention(KEY), PACKED
    run = eqx.filter_jit(dpx.score_packed)
    assert_close(run(policy, batch, how="map"), run(policy, batch), 1e-12)


def test_an_adapted_model_may_take_a_batch():
    policy = dpx.adapt(Batched(PLAIN), lambda model, ids, key: model(ids, key=key))
    shapes = eqx.filter_eval_shape(dpx.score_pairs, policy, BATCH, key=KEY, how="batch")
    assert shapes.chosen.shape == (4,)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_step(way):
    policy, how = WAYS[way]
    policy = eqx.tree_at(lambda p: p.inner, policy, Perceptron(KEY, rate=0.25))
    score = partial(dpx.score_pairs, how=how)
    reference = eqx.nn.inference_mode(policy)
    evaluated = eqx.filter_jit(dpx.make_eval(losses.dpo, score=score))(
        policy, BATCH, reference
    ).mean()
    assert abs(evaluated["loss"] - np.log(2)) < 1e-12
    grad = eqx.filter_jit(dpx.make_grad(losses.dpo, score=score, microbatches=2))
    gradients, metrics = grad(policy, BATCH, reference, key=KEY)
    assert abs(metrics["loss"] - np.log(2)) > 1e-6  # dropout
    assert metrics["grad_norm"] > 0
    if how == "map":
        plain = eqx.filter_jit(dpx.make_grad(losses.dpo, microbatches=2))
        dropped = plain(policy.inner, BATCH, reference.inner, key=KEY)
        assert_close((gradients.inner, metrics), dropped, 1e-12)


def test_a_wrong_word(unchecked):
    with pytest.raises(ValueError, match="`how` must be one of 'vmap', 'map', 'batch'; got 'scan'"):
        dpx.score_pairs(PLAIN, BATCH, how="scan")
    with pytest.raises(ValueError, match="`how` must be one of 'vmap', 'map'; got 'batch'"):
        dpx.score_packed(Attention(KEY), PACKED, how="batch")


def test_what_vmap_refuses_has_a_remedy():
    with pytest.raises(
        ValueError, match=r"Batching rule for 'alone' not implemented.*Run the rows one after"
    ) as caught:
        dpx.score_pairs(Unmappable(PLAIN), BATCH)
    assert 'functools.partial(dpx.score_pairs, how="map")' in str(caught.value)


def test_a_batch_axis_has_two_remedies():
    with pytest.raises(ValueError, match="Adapt the model") as caught:
        dpx.score_pairs(Batched(PLAIN), BATCH, key=KEY)
    assert 'functools.partial(dpx.score_pairs, how="batch")' in str(caught.value)


class Wrong(eqx.Module):
    change: object = eqx.field(static=True)

    def __call__(self, ids):
        return self.change(jax.nn.one_hot(ids, VOCAB))


@pytest.mark.parametrize(
    ("change", "got"),
    [(lambda x: (x, x), "a tuple of 2"), (lambda x: x[0], r"\(11, 11\) in float64")],
)
def test_a_batch_of_something_else(change, got):
    with pytest.raises(ValueError, match=r"\(rows, length, vocab\).*" + f"got {got}.* from Wrong"):
        dpx.score_pairs(Wrong(change), BATCH, how="batch")


def test_one_sequence_is_no_batch():
    class One(Perceptron):
        def __call__(self, ids, *, key=None):
            (_,) = ids.shape
            return super().__call__(ids, key=key)

    with pytest.raises(ValueError, match="too many values") as caught:
        dpx.score_pairs(One(KEY), BATCH, how="batch")
    assert 'leave out `how="batch"`' in caught.value.__notes__[0]
