"""Small policies and random batches that the tests share."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import dpo_eqx as dpx

VOCAB = 11


class Recurrent(eqx.Module):
    """A GRU language model, written as any user would: it knows nothing of the library."""

    embedding: jax.Array
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key, *, width=6, dtype=None):
        a, b, c = jax.random.split(key, 3)
        self.embedding = jax.random.normal(a, (VOCAB, width), dtype)
        self.cell = eqx.nn.GRUCell(width, width, key=b, dtype=dtype)
        self.head = eqx.nn.Linear(width, VOCAB, key=c, dtype=dtype)

    def __call__(self, ids):
        inputs = self.embedding[ids]

        def advance(state, x):
            state = self.cell(x, state)
            return state, state

        # From the data, not a constant: a constant carry does not trace under `check_vma=True`.
        _, states = jax.lax.scan(advance, jnp.zeros_like(inputs[0]), inputs)
        return jax.vmap(self.head)(states)


class Perceptron(eqx.Module):
    """Two layers on a window of two tokens, with dropout: the cheapest policy there is."""

    embedding: jax.Array
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key, *, rate=0.0, dtype=None):
        a, b = jax.random.split(key)
        self.embedding = jax.random.normal(a, (VOCAB, 4), dtype)
        self.mlp = eqx.nn.MLP(8, VOCAB, 16, 1, key=b, dtype=dtype)
        self.dropout = eqx.nn.Dropout(rate, inference=rate == 0.0)

    def __call__(self, ids, *, key=None):
        now = self.embedding[ids]
        before = jnp.concatenate([jnp.zeros_like(now[:1]), now[:-1]])
        hidden = self.dropout(jnp.concatenate([now, before], axis=1), key=key)
        return jax.vmap(self.mlp)(hidden)


class Attention(eqx.Module):
    """One head of attention, offering `FastPolicy` through `layout.mask()` alone."""

    tokens: jax.Array
    positions: jax.Array
    query: jax.Array
    value: jax.Array
    unembedding: jax.Array
    unembedding_bias: jax.Array | None
    softcap: float | None = eqx.field(static=True)

    def __init__(self, key, *, width=8, length=64, bias=True, softcap=3.0, dtype=None):
        shapes = [(VOCAB, width), (length, width), (width, width), (width, width), (VOCAB, width)]
        keys = jax.random.split(key, 6)
        arrays = [jax.random.normal(k, s, dtype) / 2 for k, s in zip(keys[:5], shapes, strict=True)]
        self.tokens, self.positions, self.query, self.value, self.unembedding = arrays
        self.unembedding_bias = jax.random.normal(keys[5], (VOCAB,), dtype) if bias else None
        self.softcap = softcap

    def __call__(self, ids):
        layout = dpx.Layout(jnp.asarray(ids.size), ids.size, ())
        logits = self.hidden(ids, layout) @ self.unembedding.T
        logits = add_bias(logits, self.unembedding_bias)
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)

    def hidden(self, ids, layout, *, key=None):
        x = self.tokens[ids] + self.positions[layout.positions]
        scores = jnp.where(layout.mask(), x @ self.query @ x.T, -jnp.inf)
        return x + jax.nn.softmax(scores, axis=-1) @ x @ self.value


def add_bias(logits, bias):
    """`logits + bias` of vectors along the last axis, without an implicit promotion of ranks."""
    return logits if bias is None else logits + jnp.expand_dims(bias, range(logits.ndim - 1))


class Plain(eqx.Module):
    """Another policy's call alone, so that it is run as any other policy is."""

    policy: eqx.Module

    def __call__(self, ids):
        return self.policy(ids)


def prefix_masks(lengths, width):
    return np.arange(width) < np.asarray(lengths)[:, None]


def random_tokens(rng, mask):
    """Random ids, and under the padding ids that are no tokens at all."""
    return dpx.Tokens(np.where(mask, rng.integers(0, VOCAB, mask.shape), -7), mask)


def random_batch(seed=0, pairs=8, prompt=5, completion=6, **fields):
    """Pairs of every length, from 1 and full rows on, with unequal weights."""
    rng = np.random.default_rng(seed)

    def lengths(width):
        return np.resize(rng.permutation(np.arange(1, width + 1)), pairs)

    masks = [prefix_masks(lengths(width), width) for width in (prompt, completion, completion)]
    fields.setdefault("weight", rng.uniform(0.5, 2.0, pairs))
    return dpx.PreferenceBatch(*(random_tokens(rng, mask) for mask in masks), **fields)


def arrays(tree):
    return eqx.filter(tree, eqx.is_array)


def statics(tree):
    return eqx.filter(tree, eqx.is_array, inverse=True)


def assert_close(got, want, tolerance):
    """Every array within `tolerance` of its counterpart, relative to 1 + |value|."""
    got, want = arrays(got), arrays(want)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_array_less(np.abs(x - y) / (1 + np.abs(y)), tolerance)


def as_users_compile(function, *args):
    """Under `jax.jit` without the flags of the tests, which change how XLA rounds."""
    arrays, static = eqx.partition(args, lambda x: isinstance(x, jax.Array | np.ndarray))

    def of_arrays(arrays):
        return eqx.filter(function(*eqx.combine(arrays, static)), eqx.is_array)

    flags = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return jax.jit(of_arrays, compiler_options=flags)(arrays)
