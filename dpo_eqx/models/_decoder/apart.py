"""The weights of a `Transformer` as a loop over tokens reads them fastest on CPUs.

In a scan over layers, XLA on CPUs copies the weights and the cache of each layer out of the stack,
for each token. Here each layer has arrays of its own, which are copied once, before the loop. They
are stored as `(in, out)`: for several rows, XLA's products with such matrices are faster.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._head.tiles import Unembedding
from ..._jax.by_platform import CPU
from ..._scoring.predict import unembedding_of
from .basic_layers import Linear
from .blocks import Caches, take_apart
from .transformer import Transformer

# For one row, XLA reads the weights where they lie in the stack.
LEAST_ROWS = 2
# No copy of more bytes is made. The copy is in memory beside the policy.
MOST_BYTES = 4_000_000_000


class Apart(eqx.Module):
    """The arrays of each layer, and the unembedding.

    While they are stored, each matrix of a linear layer has shape `(in, out)`, and the unembedding
    has `(width, vocab)`.
    """

    layers: tuple[PyTree, ...]
    unembedding: Unembedding

    @staticmethod
    def of(policy: Transformer) -> "Apart":
        """A copy of the weights of a policy, stored for the loop."""
        stacks = (eqx.filter(policy.layers, eqx.is_array),)
        layers = tuple(layer for (layer,) in take_apart(stacks, policy.config.kinds))
        # Without the barrier, XLA would undo the transposition.
        return jax.lax.optimization_barrier(_turned(Apart(layers, unembedding_of(policy))))

    def for_use(self) -> "Apart":
        """The same with shapes `(out, in)`; XLA transposes nothing, but reads it as it lies."""
        return _turned(self)


def is_worth_it(policy: Transformer, rows: int, platform: str) -> bool:
    """Whether the weights should be taken apart to draw this many rows on a platform."""
    weights = jax.tree.leaves(eqx.filter((policy.layers, policy.unembedding), eqx.is_array))
    size = sum(x.size * np.dtype(x.dtype).itemsize for x in weights)
    # XLA would decode all quantised weights before the loop, and hold them.
    is_plain = all(jnp.issubdtype(x.dtype, jnp.floating) for x in weights)
    return platform == CPU and rows >= LEAST_ROWS and size <= MOST_BYTES and is_plain


def caches_apart(caches: Caches, policy: Transformer) -> tuple[Caches, ...]:
    """The caches of each layer, from those of all layers."""
    # Without the barrier, XLA would copy the whole stack for each layer.
    stacks, kinds = jax.lax.optimization_barrier((caches,)), policy.config.kinds
    return tuple(
        Caches(**{mixer: getattr(own, mixer)})
        for (own,), (mixer, _) in zip(take_apart(stacks, kinds), kinds, strict=True)
    )


def _turned(apart: Apart) -> Apart:
    """Every matrix of linear layers and of the unembedding, transposed."""

    def is_matrix(node):
        return isinstance(node, Linear | Unembedding)

    def turn(node):
        if not is_matrix(node) or node.weight is None:
            return node
        return eqx.tree_at(lambda x: x.weight, node, node.weight.T)

    return jax.tree.map(turn, apart, is_leaf=is_matrix)
