"""How tokens are cut into chunks and the vocabulary into parts, for each platform.

`tiles.py` makes the tiles.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Float

from .._jax.by_platform import CUDA
from .._jax.microbatches import Size, merge, nearest_divisor, split

# Logits held at once. A CPU is fastest if they stay in its cache: 8 MiB of float32. An accelerator
# is fastest if a product is large enough to fill it: 256 MiB.
LOGITS_AT_ONCE = {"cpu": 2**21}
LOGITS_AT_ONCE_ELSEWHERE = 2**26
# Tokens at once, unless the caller chooses. More tokens leave room only for thin parts of the
# vocabulary.
TOKENS_AT_ONCE = 4096


class Tiling(NamedTuple):
    """How tokens are cut into chunks, and the vocabulary into parts.

    - `shape`: of the tokens, `(*batch, length)`.
    - `most`: the largest number of tokens in a chunk.
    - `parts`: the number of parts of the vocabulary.
    - `joint`: whether two sums over the same logits are one operation.
    """

    shape: tuple[Size, ...]
    most: int
    parts: int
    joint: bool = False

    def chunks(self, tree: Any) -> Any:
        """Arrays `(*shape, ...)` as chunks `(count, chunk, ...)`, the last padded with zeros."""
        count, chunk = chunk_count(self.shape, self.most)

        def chunked(x):
            flat = x.reshape(math.prod(self.shape), *x.shape[len(self.shape) :])
            missing = count * chunk - flat.shape[0]
            return split(jnp.pad(flat, [(0, missing)] + [(0, 0)] * (flat.ndim - 1)), count)

        return jax.tree.map(chunked, tree)

    def sums(self, *arrays: Float[Array, "chunk part"]) -> Sequence[Float[Array, " chunk"]]:
        """The sum of each array over its last axis."""
        if not self.joint:
            return [x.sum(axis=-1) for x in arrays]
        zeros = tuple(jnp.zeros((), x.dtype) for x in arrays)
        return jax.lax.reduce(arrays, zeros, partial(jax.tree.map, jnp.add), (1,))

    def tokens(self, tree: Any) -> Any:
        """The inverse of `chunks`."""
        count = math.prod(self.shape)
        return jax.tree.map(lambda x: x[:count].reshape(*self.shape, *x.shape[1:]), merge(tree))


def tiling_for(
    shape: tuple[Size, ...], chunk_size: int | None, vocab: int
) -> Callable[[str], Tiling]:
    """The tiling for each platform, as `by_platform` wants it."""

    def plan_for(platform: str) -> Tiling:
        most = chunk_count(shape, chunk_size or TOKENS_AT_ONCE)[1]
        at_once = LOGITS_AT_ONCE.get(platform, LOGITS_AT_ONCE_ELSEWHERE)
        parts = _parts(vocab, most * vocab / at_once)
        # A small vocabulary cannot be split into thin parts, so a chunk has fewer tokens then.
        most = max(1, min(most, 4 * at_once * parts // vocab))
        # A GPU reads logits from memory for each sum apart; a CPU is slower with both in one.
        return Tiling(shape, most, parts, joint=platform == CUDA)

    return plan_for


def chunk_count(shape: tuple[Size, ...], most: int) -> tuple[Size, int]:
    """The number and the size of equal chunks, at most `most` tokens each, for this shape.

    If a size is symbolic, as in `jax.export`, the chunk size divides the product of the other
    sizes, so that no comparison needs the symbolic size.
    """
    fixed = math.prod(n for n in shape if not is_symbolic_dim(n))
    tokens = math.prod(shape)
    if any(is_symbolic_dim(n) for n in shape):
        chunk = max(n for n in range(1, min(fixed, most) + 1) if fixed % n == 0)
        return tokens // chunk, chunk
    count = max(1, -(-tokens // most))
    return count, -(-tokens // count)


def _parts(vocab: int, wanted: float) -> int:
    """The number of parts, near `wanted`.

    The parts are equal if the vocabulary has such a divisor. Otherwise the last part overlaps the
    part before it.
    """
    rows = vocab // groups_of(vocab)
    wanted = min(max(wanted, 1.0), float(rows))
    equal = nearest_divisor(rows, wanted)
    if 2 / 3 <= equal / wanted <= 3 / 2:
        return equal
    return -(-rows // -(-rows // round(wanted)))


def groups_of(vocab: int) -> int:
    """The number of groups of neighbouring rows; each part takes an equal share of every group.

    Under automatic partitioning, up to eight devices that hold shards of the rows then share each
    part. With parts of neighbouring rows they would wait for one another.
    """
    return math.gcd(vocab, 8)
