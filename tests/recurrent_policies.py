"""Recurrent policies for the tests: a selective state-space model and a linear recurrent unit.

Each has a plain call that knows nothing of states, and reads in parts by `start` and `extend`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from .policies import VOCAB, add_bias

KERNEL = 3  # width of the causal convolution


class Reads(eqx.Module):
    """`start` and `extend` from `read(state, ids)`, which returns all states and all outputs."""

    def __call__(self, ids, *, key=None):
        _, hidden = self.read(self.zeros(), ids)
        logits = add_bias(hidden @ self.unembedding.T, getattr(self, "unembedding_bias", None))
        cap = getattr(self, "softcap", None)
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def start(self, ids, length, *, key=None):
        states, hidden = self.read(self.zeros(), ids)
        return jax.tree.map(lambda x: x[length - 1], (states, hidden))

    def extend(self, state, ids, *, key=None):
        states, hidden = self.read(state, ids)
        return jax.tree.map(lambda x: x[-1], states), hidden


class SelectiveBlock(eqx.Module):
    """A block of Mamba: convolution, a recurrence whose steps depend on the input, and a gate."""

    into: jax.Array
    kernel: jax.Array
    steps: jax.Array
    mixing: jax.Array
    decay: jax.Array
    out: jax.Array

    def __init__(self, key, width, inner, states):
        k = jax.random.split(key, 5)
        self.into = jax.random.normal(k[0], (width, 2 * inner)) / 2
        self.kernel = jax.random.normal(k[1], (KERNEL, inner)) / 2
        self.steps = jax.random.normal(k[2], (inner, inner)) / 4
        self.mixing = jax.random.normal(k[3], (inner, 2 * states)) / 2
        self.decay = jnp.tile(jnp.arange(1.0, states + 1)[None], (inner, 1))
        self.out = jax.random.normal(k[4], (inner, width)) / 2

    def zeros(self):
        inner, states = self.decay.shape
        return jnp.zeros((KERNEL - 1, inner)), jnp.zeros((inner, states))

    def read(self, state, x):
        before, memory = state
        u, gate = jnp.split(x @ self.into, 2, axis=1)  # (length, inner)
        u = jnp.concatenate([before, u])
        windows = jnp.stack([u[i : i + x.shape[0]] for i in range(KERNEL)], axis=1)
        kept = jnp.concatenate([windows[:, 1:], u[KERNEL - 1 :, None]], axis=1)[:, : KERNEL - 1]
        u = jax.nn.silu((windows * self.kernel[None]).sum(1))
        step = jax.nn.softplus(u @ self.steps)[:, :, None]
        into, outof = jnp.split(u @ self.mixing, 2, axis=1)  # (length, states)
        factors = jnp.exp(-step * self.decay[None])
        terms = step * u[:, :, None] * into[:, None]

        def advance(memory, inputs):
            memory = inputs[0] * memory + inputs[1]
            return memory, memory

        _, memories = jax.lax.scan(advance, memory, (factors, terms))
        y = (memories * outof[:, None]).sum(-1) * jax.nn.silu(gate)
        return (kept, memories), x + y @ self.out


class Mamba(Reads):
    """Two selective blocks, and a head with a bias and a soft cap."""

    embedding: jax.Array
    blocks: list[SelectiveBlock]
    unembedding: jax.Array
    unembedding_bias: jax.Array
    softcap: float = eqx.field(static=True)

    def __init__(self, key, width=6, inner=8, states=3):
        k = jax.random.split(key, 5)
        self.embedding = jax.random.normal(k[0], (VOCAB, width))
        self.blocks = [SelectiveBlock(k[i], width, inner, states) for i in (1, 2)]
        self.unembedding = jax.random.normal(k[3], (VOCAB, width))
        self.unembedding_bias = jax.random.normal(k[4], (VOCAB,))
        self.softcap = 4.0

    def zeros(self):
        return [block.zeros() for block in self.blocks]

    def read(self, state, ids):
        x, states = self.embedding[ids], []
        for block, before in zip(self.blocks, state, strict=True):
            new, x = block.read(before, x)
            states.append(new)
        return states, x / jnp.sqrt((x**2).mean(1, keepdims=True) + 1e-6)


class LRU(Reads):
    """A diagonal complex recurrence by `associative_scan`, and dropout of its outputs."""

    embedding: jax.Array
    rates: jax.Array
    angles: jax.Array
    into: jax.Array
    outof: jax.Array
    unembedding: jax.Array
    rate: float = eqx.field(static=True)

    def __init__(self, key, width=6, states=5, rate=0.0):
        k = jax.random.split(key, 5)
        self.embedding = jax.random.normal(k[0], (VOCAB, width))
        self.rates = jnp.linspace(-3.0, -0.5, states)
        self.angles = jnp.linspace(0.1, 2.0, states)
        self.into = jax.random.normal(k[1], (2, width, states))
        self.outof = jax.random.normal(k[2], (2, states, width))
        self.unembedding = jax.random.normal(k[3], (VOCAB, width))
        self.rate = rate

    def zeros(self):
        return jnp.zeros(self.rates.size, complex)

    def read(self, state, ids):
        x = self.embedding[ids]
        factor = jnp.exp(jax.lax.complex(-jnp.exp(self.rates), self.angles))
        terms = jax.lax.complex(*(x @ self.into[i] for i in (0, 1)))
        terms = jnp.concatenate([(factor * state + terms[0])[None], terms[1:]])
        factors = jnp.tile(factor[None], (ids.size, 1))

        def join(early, late):
            return early[0] * late[0], late[0] * early[1] + late[1]

        _, states = jax.lax.associative_scan(join, (factors, terms))
        y = states.real @ self.outof[0] - states.imag @ self.outof[1]
        return states, x + jnp.tanh(y)

    def _dropped(self, hidden, key):
        if key is None or self.rate == 0:
            return hidden
        mask = jax.random.bernoulli(key, 1 - self.rate, hidden.shape)
        return jnp.where(mask, hidden / (1 - self.rate), 0)

    def __call__(self, ids, *, key=None):
        _, hidden = self.read(self.zeros(), ids)
        return self._dropped(hidden, key) @ self.unembedding.T

    def start(self, ids, length, *, key=None):
        state, hidden = super().start(ids, length)
        return state, self._dropped(hidden, key)

    def extend(self, state, ids, *, key=None):
        state, hidden = super().extend(state, ids)
        return state, self._dropped(hidden, key)
