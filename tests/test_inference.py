"""Inference mode switches the flags of Equinox's layers, and nothing that shares their name."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx._jax.inference_mode import in_inference
from dpo_eqx.losses import dpo

from .policies import Perceptron, random_batch


class Method(Perceptron):
    def inference(self):
        return self.embedding


class Property(Perceptron):
    @property
    def inference(self):
        return self.dropout.inference


class Static(Perceptron):
    inference: str = eqx.field(static=True, default="greedy")


class Holder(Perceptron):
    inference: object

    def __init__(self, key, *, rate):
        super().__init__(key, rate=rate)
        self.inference = self.made()


class Flag(Holder):
    def made(self):
        return False


class Absent(Holder):
    def made(self):
        return None


class Submodule(Holder):
    def made(self):
        return eqx.nn.Dropout(0.5)


class Numbers(Holder):
    def made(self):
        return jnp.ones(3)


KINDS = [Perceptron, Method, Property, Static, Flag, Absent, Submodule, Numbers]


@pytest.mark.parametrize("kind", KINDS)
def test_only_flags_are_switched(kind):
    policy = kind(jax.random.key(0), rate=0.5)
    got = in_inference(policy)
    assert got.dropout.inference is True
    if kind is Flag:
        assert got.inference is True
    if kind is Submodule:
        assert got.inference.inference is True
    want = eqx.tree_at(lambda p: p.dropout.inference, policy, replace=True)
    if kind not in (Flag, Submodule):
        assert eqx.tree_equal(got, want)


def test_flags_that_are_arrays_and_flags_within_flagged_modules():
    class Outer(eqx.Module):
        inner: list
        inference: jax.Array | np.ndarray

    inner = [eqx.nn.Dropout(0.5), {"inference": False}]
    for flag in (jnp.array(False), np.array(False), np.bool_(False)):
        got = in_inference(Outer(inner, flag))
        assert got.inference is True
        assert got.inner[0].inference is True
        # A dictionary's key is no attribute of a layer.
        assert got.inner[1] == {"inference": False}


def test_as_equinox_does_with_its_own_layers():
    model = eqx.nn.Sequential(
        [
            eqx.nn.Dropout(0.1),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.MultiheadAttention(2, 4, dropout_p=0.5, key=jax.random.key(0)),
        ]
    )
    assert eqx.tree_equal(in_inference(model), eqx.nn.inference_mode(model))


@pytest.mark.parametrize("kind", [Method, Static, Absent])
def test_a_step_with_such_a_policy(kind):
    policy = kind(jax.random.key(0), rate=0.5)
    grad = eqx.filter_jit(dpx.make_grad(dpo))
    _, metrics = grad(policy, random_batch(), policy, key=jax.random.key(1))
    assert np.isfinite(metrics["loss"])
    reference = in_inference(policy)
    means = eqx.filter_jit(dpx.make_eval(dpo))(policy, random_batch(), reference).mean()
    np.testing.assert_allclose(means["loss"], np.log(2), atol=1e-12)
