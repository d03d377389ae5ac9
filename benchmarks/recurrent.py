"""A recurrent policy by its `start` and `extend`, and by its plain call: a gradient, and drawing.

    python -m benchmarks.recurrent
    python -m benchmarks.recurrent --prompt 128 --completion 128

The policy is a stack of gated linear recurrences. Both ways take turns in one process.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import dpo_eqx as dpx
from dpo_eqx import losses, models

from .parts import Part, timed


class Layer(eqx.Module):
    """A gated linear recurrence, by `associative_scan`, with a residual connection."""

    into: Array
    decay: Array
    out: Array

    def __init__(self, width: int, *, key: Array):
        a, b = jax.random.split(key)
        self.into = jax.random.normal(a, (width, 2 * width)) / width**0.5
        self.decay = jnp.linspace(0.0, 6.0, width)
        self.out = jax.random.normal(b, (width, width)) / width**0.5

    def __call__(
        self, state: Float[Array, " width"], x: Float[Array, "length width"]
    ) -> tuple[Float[Array, "length width"], Float[Array, "length width"]]:
        """The states and the outputs."""
        inputs, gate = jnp.split(x @ self.into, 2, axis=1)
        decay = jax.nn.sigmoid(self.decay)
        terms = (1 - decay) * inputs
        terms = terms.at[0].add(decay * state)

        def join(early, late):
            return early[0] * late[0], late[0] * early[1] + late[1]

        factors = jnp.broadcast_to(decay, terms.shape)
        _, states = jax.lax.associative_scan(join, (factors, terms))
        return states, x + (states * jax.nn.silu(gate)) @ self.out


class Recurrence(eqx.Module):
    """A `RecurrentPolicy` of several layers."""

    embedding: Array
    layers: list[Layer]
    unembedding: Array

    def __init__(self, vocab: int, width: int, layers: int, *, key: Array):
        first, last, *keys = jax.random.split(key, 2 + layers)
        self.embedding = jax.random.normal(first, (vocab, width))
        self.layers = [Layer(width, key=key) for key in keys]
        self.unembedding = jax.random.normal(last, (vocab, width)) / width**0.5

    def read(
        self, state: list[Array], ids: Int[Array, " length"]
    ) -> tuple[list[Array], Float[Array, "length width"]]:
        """The states after each token, and the hidden states."""
        x, states = self.embedding[ids], []
        for layer, before in zip(self.layers, state, strict=True):
            after, x = layer(before, x)
            states.append(after)
        return states, x / jnp.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)

    def zeros(self) -> list[Array]:
        """The state before the first token."""
        return [jnp.zeros(layer.decay.shape) for layer in self.layers]

    def __call__(
        self, ids: Int[Array, " length"], *, key: Array | None = None
    ) -> Float[Array, "length vocab"]:
        """The logits."""
        return self.read(self.zeros(), ids)[1] @ self.unembedding.T

    def start(self, ids: Array, length: Array, *, key: Array | None = None):
        """As in `RecurrentPolicy`."""
        states, hidden = self.read(self.zeros(), ids)
        return jax.tree.map(lambda x: x[length - 1], (states, hidden))

    def extend(self, state: list[Array], ids: Array, *, key: Array | None = None):
        """As in `RecurrentPolicy`."""
        states, hidden = self.read(state, ids)
        return jax.tree.map(lambda x: x[-1], states), hidden


def _call(policy: Recurrence, ids: Array, key: Array | None) -> Array:
    return policy(ids)


def parts_of(options: argparse.Namespace) -> list[Part]:
    """A gradient of DPO and a draw of completions, each by the state and by the plain call."""
    policy = Recurrence(options.vocab, options.width, options.layers, key=jax.random.key(0))
    plain = dpx.adapt(policy, _call)
    rng = np.random.default_rng(0)

    def tokens(width):
        ids = rng.integers(0, options.vocab, (options.pairs, width), dtype=np.int32)
        return dpx.Tokens(jnp.asarray(ids), jnp.ones(ids.shape, bool))

    chosen, rejected = tokens(options.completion), tokens(options.completion)
    batch = dpx.PreferenceBatch(tokens(options.prompt), chosen, rejected)
    gradient = eqx.filter_jit(dpx.make_grad(losses.dpo))
    draw = partial(models.generate, max_new_tokens=options.completion, temperature=0)
    return [
        Part("gradient, plain call", gradient, (plain, batch, dpx.snapshot(plain)), 0),
        Part("gradient, by the state", gradient, (policy, batch, dpx.snapshot(policy)), 0),
        Part("drawing, plain call", draw, (plain, batch.prompt), 0),
        Part("drawing, by the state", draw, (policy, batch.prompt), 0),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"pairs": 4, "prompt": 512, "completion": 32, "vocab": 4096, "width": 256, "layers": 4}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    parts = parts_of(options)
    seconds = timed(parts, options.rounds)
    print("| part | s | times faster |\n| --- | --- | --- |")
    for number, (part, spent) in enumerate(zip(parts, seconds, strict=True)):
        ratio = f"{seconds[number - 1] / spent:.1f}" if number % 2 else ""
        print(f"| {part.name} | {spent:.3f} | {ratio} |")


if __name__ == "__main__":
    main()
