"""Arrays that wait in the memory of the host while a step does not need them."""

from typing import Any, TypeVar

import equinox as eqx
import jax

Tree = TypeVar("Tree")
# JAX's name of host memory that a device reads directly.
HOST = "pinned_host"


def in_host_memory(tree: Tree, flag: str) -> Tree:
    """`tree` with its arrays in the memory of the host.

    **Raises:**

    `ValueError` that names `flag` if the devices cannot read the memory of the host.
    """
    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    if HOST not in kinds:
        raise ValueError(
            f"`{flag}` needs devices that read the memory of the host; these have only "
            f"{', '.join(sorted(kinds))}. Leave it out."
        )
    return _moved(tree, HOST)


def on_devices(tree: Tree) -> Tree:
    """`tree` with the arrays that are in the memory of the host in that of their devices."""
    default = jax.local_devices()[0].default_memory().kind
    return _moved(tree, default, of=HOST)


def fetched(tree: Tree) -> Tree:
    """Inside a jitted function: `tree` in the memory of the devices."""
    return _put(tree, jax.memory.Space.Device)


def returned(tree: Tree) -> Tree:
    """Inside a jitted function: `tree` in the memory of the host."""
    return _put(tree, jax.memory.Space.Host)


def _put(tree: Any, space: jax.memory.Space) -> Any:
    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, space), static)


def _moved(tree: Any, kind: str, *, of: str | None = None) -> Any:
    """The arrays of `tree` in the memory `kind`; with `of` only those that are in that memory."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or of not in (None, leaf.sharding.memory_kind):
            return leaf
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return jax.tree.map(move, tree)
