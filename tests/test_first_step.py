"""With the policy as its own reference the first loss of DPO is log 2, in every dtype.

In bfloat16 that is a matter of design: a differentiated forward pass and a plain one compile to
different fusions, which keep excess precision differently.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_eqx as dpx
from dpo_eqx.losses import dpo

from .policies import VOCAB, Recurrent, random_batch

BOUNDS = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-5}


class Decoder(eqx.Module):
    """A transformer with its layers unrolled or scanned; `blocks` is one stacked module."""

    embedding: jax.Array
    positions: jax.Array
    blocks: dict[str, jax.Array]
    scanned: bool = eqx.field(static=True)

    def __init__(self, key, *, scanned, width=16, layers=3, length=32):
        keys = jax.random.split(key, 7)

        def array(key, *shape):
            return jax.random.normal(key, shape, jnp.float32) / shape[-1] ** 0.5

        self.embedding = array(keys[0], VOCAB, width)
        self.positions = array(keys[1], length, width)
        self.blocks = {
            "attend": array(keys[2], layers, 3, width, width),
            "project": array(keys[3], layers, width, width),
            "up": array(keys[4], layers, width, 4 * width),
            "down": array(keys[5], layers, 4 * width, width),
        }
        self.scanned = scanned

    def __call__(self, ids):
        x = self.embedding[ids] + self.positions[: ids.size]
        visible = jnp.tril(jnp.ones((ids.size, ids.size), bool))

        def block(x, layer):
            q, k, v = normalised(x) @ layer["attend"]
            scores = jnp.where(visible, q @ k.T / q.shape[-1] ** 0.5, -jnp.inf)
            x = x + jax.nn.softmax(scores) @ v @ layer["project"]
            return x + jax.nn.gelu(normalised(x) @ layer["up"]) @ layer["down"], None

        if self.scanned:
            x, _ = jax.lax.scan(block, x, self.blocks)
        else:
            for i in range(self.blocks["up"].shape[0]):
                x, _ = block(x, jax.tree.map(lambda w, i=i: w[i], self.blocks))
        return normalised(x) @ self.embedding.T


def normalised(x):
    wide = x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    return (wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


class FastDecoder(Decoder):
    """The same, with the unembedding applied by the library."""

    @property
    def unembedding(self):
        return self.embedding

    def hidden(self, ids, layout, *, key=None):
        identity = eqx.tree_at(lambda p: p.embedding, self, self.embedding)
        x = identity.embedding[ids] + identity.positions[layout.positions]
        visible = layout.mask()
        for i in range(self.blocks["up"].shape[0]):
            layer = jax.tree.map(lambda w, i=i: w[i], self.blocks)
            q, k, v = normalised(x) @ layer["attend"]
            scores = jnp.where(visible, q @ k.T / q.shape[-1] ** 0.5, -jnp.inf)
            x = x + jax.nn.softmax(scores) @ v @ layer["project"]
            x = x + jax.nn.gelu(normalised(x) @ layer["up"]) @ layer["down"]
        return normalised(x)


POLICIES = {
    "unrolled": lambda: Decoder(jax.random.key(0), scanned=False),
    "scanned": lambda: Decoder(jax.random.key(0), scanned=True),
    "fast": lambda: FastDecoder(jax.random.key(0), scanned=False),
    "recurrent": lambda: Recurrent(jax.random.key(0), dtype=jnp.float32),
}


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.slow) for n in ("unrolled", "scanned")]
    + ["fast", "recurrent"]
)
def policy(request):
    return POLICIES[request.param]()


@pytest.mark.parametrize(
    ("dtype", "microbatches"),
    [
        ("bfloat16", 1),
        pytest.param("bfloat16", 2, marks=pytest.mark.slow),
        pytest.param("float32", 1, marks=pytest.mark.slow),
        pytest.param("float32", 2, marks=pytest.mark.slow),
        pytest.param("float64", 1, marks=pytest.mark.slow),
        pytest.param("float64", 2, marks=pytest.mark.slow),
    ],
)
def test_the_first_loss_is_log_two(policy, dtype, microbatches):
    # Long completions: in bfloat16 their log-probabilities would be off by tenths of a nat.
    batch = random_batch(pairs=4, prompt=8, completion=20, weight=None)
    if dtype == "float64":
        policy = jax.tree.map(lambda x: x.astype(dtype), policy)
    compute_dtype = jnp.bfloat16 if dtype == "bfloat16" else None
    options = {"compute_dtype": compute_dtype, "microbatches": microbatches}
    grad = eqx.filter_jit(dpx.make_grad(dpo, **options))

    _, live = grad(policy, batch, policy)
    assert abs(live["loss"] - np.log(2)) < BOUNDS[dtype]
    assert live["grad_norm"] > 0

    precompute = eqx.filter_jit(dpx.precompute_reference)
    stored = dataclasses.replace(batch, reference=precompute(policy, batch, **options))
    _, precomputed = grad(policy, stored)
    assert abs(precomputed["loss"] - np.log(2)) < BOUNDS[dtype]


class Casting(eqx.Module):
    """A policy that casts inside itself: its parameters do not tell in which dtype it computes."""

    policy: Decoder

    def __call__(self, ids):
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.policy)
        return narrow(ids).astype(jnp.float32)


class FastCasting(Casting):
    """The same with the fast path."""

    policy: FastDecoder

    @property
    def unembedding(self):
        return self.policy.unembedding.astype(jnp.bfloat16)

    def hidden(self, ids, layout, *, key=None):
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), self.policy)
        return narrow.hidden(ids, layout, key=key)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param((Casting, "unrolled"), marks=pytest.mark.slow),
        pytest.param((Casting, "scanned"), marks=pytest.mark.slow),
        (FastCasting, "fast"),
    ],
    ids=lambda kind: kind[1],
)
@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_policies_that_cast_inside_themselves(kind, microbatches):
    wrap, name = kind
    policy = wrap(POLICIES[name]())
    batch = random_batch(pairs=4, prompt=8, completion=20, weight=None)
    options = {"microbatches": microbatches}
    grad = eqx.filter_jit(dpx.make_grad(dpo, **options))
    _, live = grad(policy, batch, policy)
    precompute = eqx.filter_jit(dpx.precompute_reference)
    stored = dataclasses.replace(batch, reference=precompute(policy, batch, **options))
    _, precomputed = grad(policy, stored)
    for metrics in (live, precomputed):
        assert abs(metrics["loss"] - np.log(2)) < BOUNDS["bfloat16"]
        assert metrics["grad_norm"] > 0
