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

from .policies import VOCAB, Recurrent, as_users_compile, random_batch

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


class OfEquinox(eqx.Module):
    """A policy of Equinox's own layers. In bfloat16 a CPU, too, rounds it as its gradient needs."""

    embedding: eqx.nn.Embedding
    norms: list[eqx.nn.LayerNorm]
    attention: list[eqx.nn.MultiheadAttention]
    mlp: list[eqx.nn.MLP]
    head: eqx.nn.Linear
    rounds_alike: bool = eqx.field(static=True)

    def __init__(self, key, *, rounds_alike=False, width=32, layers=2):
        keys = jax.random.split(key, 2 * layers + 2)
        self.embedding = eqx.nn.Embedding(VOCAB, width, key=keys[0])
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(2 * layers)]
        self.attention = [eqx.nn.MultiheadAttention(2, width, key=k) for k in keys[2::2]]
        self.mlp = [eqx.nn.MLP(width, width, 64, 1, jax.nn.gelu, key=k) for k in keys[3::2]]
        self.head = eqx.nn.Linear(width, VOCAB, key=keys[1])
        self.rounds_alike = rounds_alike

    def __call__(self, ids):
        x = jax.vmap(self.embedding)(ids)
        mask = jnp.tri(ids.size, dtype=bool)
        norms = iter(self.norms)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            normed = jax.vmap(next(norms))(x)
            x = x + attention(normed, normed, normed, mask=mask)
            x = x + jax.vmap(mlp)(jax.vmap(next(norms))(x))
        return jax.vmap(self.head)(x)


@pytest.mark.slow
def test_log_ratios_in_bf16_are_zero_to_the_last_bit():
    policy = OfEquinox(jax.random.key(0))
    batch = random_batch(pairs=4, prompt=8, completion=20, weight=None)

    def ratios(log_probs, reference, _):
        moved = jax.tree.map(lambda x, y: jnp.abs(x - y), log_probs, reference)
        return {"ratios": moved.chosen + moved.rejected}

    grad = dpx.make_grad(dpo, compute_dtype=jnp.bfloat16, metrics=ratios)
    _, metrics = as_users_compile(grad, policy, batch, policy)
    assert metrics["ratios"] == 0


@pytest.mark.parametrize(
    ("rounds_alike", "dtype", "again"),
    [(False, jnp.bfloat16, True), (True, jnp.bfloat16, False), (False, None, False)],
)
def test_which_forward_passes_run_once_more(rounds_alike, dtype, again):
    policy = OfEquinox(jax.random.key(0), rounds_alike=rounds_alike, layers=1)
    batch = random_batch(pairs=2, prompt=3, completion=2)
    grad = dpx.make_grad(dpo, compute_dtype=dtype)
    jaxpr, *_ = eqx.filter_make_jaxpr(grad)(policy, batch, policy)
    assert any(e.primitive.name.startswith(("remat", "checkpoint")) for e in jaxpr.eqns) == again
