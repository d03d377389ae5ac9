"""The error of a device that is out of memory, in words that say what fills it and what helps."""

import contextlib
import re
from collections.abc import Iterator, Mapping

import jax
from jaxtyping import PyTree

from ..._jax.paths import leaf_name
from ...sharding._plan import in_bytes
from .offload import HOST


@contextlib.contextmanager
def explained(parts: Mapping[str, PyTree], remedies: str) -> Iterator[None]:
    """Raises `MemoryError` for the user in place of JAX's error.

    **Arguments:**

    - `parts`: what the run holds, by name. What is in the memory of the host does not count.
    - `remedies`: the flags that help, for the end of the message.
    """
    sizes = {name: _bytes(part) for name, part in parts.items()}
    largest = _largest(parts)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(_message(str(error), sizes, largest, remedies)) from error


def _message(error: str, sizes: Mapping[str, int], largest: str, remedies: str) -> str:
    asked = re.search(r"(?:allocate|allocating) ([\d.]+) ?(\w+)", error)
    what = ""
    if asked:
        number, unit = asked.groups()
        more = in_bytes(int(number)) if unit == "bytes" else f"{number} {unit}"
        what = f" It could not get {more} more."
    held = ", ".join(f"{name} {in_bytes(size)}" for name, size in sizes.items() if size)
    holds = f" It holds, over all devices: {held}{largest}." if held else ""
    share = ""
    if jax.default_backend() == "gpu":
        share = (
            " JAX takes 75% of a GPU's memory when it starts; the environment variable "
            "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives it more."
        )
    return f"The device is out of memory.{what}{holds} {remedies}{share}"


def _bytes(part: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(part) if _is_on_device(leaf))


def _is_on_device(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and leaf.sharding.memory_kind != HOST


def _largest(parts: Mapping[str, PyTree]) -> str:
    """The largest array of all parts, in words."""
    found = [
        (leaf.nbytes, f"{name}{leaf_name(path)}")
        for name, part in parts.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(part)
        if _is_on_device(leaf)
    ]
    if not found:
        return ""
    size, name = max(found)
    return f"; the largest array is {name} of {in_bytes(size)}"
