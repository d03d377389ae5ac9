"""Random keys for the parts of a module that draw random numbers, such as adapters with dropout.

The callers of such a part do not know about keys. `basic_layers.py` has the dropout itself.
"""

from abc import abstractmethod
from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

Module = TypeVar("Module")
Part = TypeVar("Part", bound="AbstractRandomPart")


class AbstractRandomPart(eqx.Module):
    """A part of a module that draws random numbers if it holds a key."""

    @property
    @abstractmethod
    def is_random(self) -> bool:
        """Whether a key has an effect."""

    @abstractmethod
    def with_key(self: Part, key: PRNGKeyArray) -> Part:
        """The same part with this key. If it is stacked, each layer of it gets its own."""


def with_keys(module: Module, key: PRNGKeyArray | None) -> Module:
    """The module with a key of its own in each part that draws random numbers.

    Without such a part, or without a key, it is the same module, and no key is split.
    """

    def is_random(node) -> bool:
        return isinstance(node, AbstractRandomPart) and node.is_random

    count = sum(map(is_random, jax.tree.leaves(module, is_leaf=is_random)))
    if key is None or not count:
        return module
    keys = iter(jax.random.split(key, count))
    return jax.tree.map(
        lambda node: node.with_key(next(keys)) if is_random(node) else node,
        module,
        is_leaf=is_random,
    )
