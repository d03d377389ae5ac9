"""Makes meshes with the axes `data`, `fsdp`, `expert` and `tensor` from their sizes.

`_rules.py`, `_policy.py` and `_batch.py` put arrays on them.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from .._jax.describe import described
from .._jax.partitioning import AXES, EXPERT, ROWS


def make_mesh(sizes: str, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the axes `data`, `fsdp`, `expert` and `tensor`, in this order.

    ```python
    mesh = sharding.make_mesh("data=4,fsdp=2")
    ```

    The pairs of a batch are sharded over `data` and `fsdp`; parameters and the optimiser's state
    over `fsdp`; heads, feed-forward layers and the vocabulary over `tensor`. `expert` is a part of
    `fsdp` along which each device holds some of the experts of a mixture, and gathers tokens in
    place of the weights of experts.

    **Arguments:**

    - `sizes`: the size of each axis, by name; an axis that is left out has size 1. The mesh has an
        axis `expert` only if it is named here.
    - `devices`: the devices of the mesh; by default all devices, including the devices of
        other processes.

    **Returns:**

    A `jax.sharding.Mesh` with automatic axes, for `eqx.filter_jit(step)` and for `shard_map`.

    **Raises:**

    `ValueError` if an axis is unknown or given twice, if a size is not a positive integer, or if
    the product of the sizes is not the number of devices.
    """
    found = parse_sizes(sizes)
    devices = jax.devices() if devices is None else list(devices)
    places = math.prod(found.values())
    if places != len(devices):
        product = " * ".join(f"{name}={size}" for name, size in found.items())
        raise ValueError(
            f"`mesh` must have as many places as there are devices, {len(devices)}; {product} "
            f"makes {places}. Change a size so that the product is {len(devices)}."
        )
    # `jax.make_mesh` makes explicit axes by default, on which `partitioning.py` has no effect.
    types = (AxisType.Auto,) * len(found)
    return jax.make_mesh(tuple(found.values()), tuple(found), axis_types=types, devices=devices)


def parse_sizes(sizes: str) -> dict[str, int]:
    """The size of each axis of the mesh for `"data=4,fsdp=2"`; raises as `make_mesh`."""
    if not isinstance(sizes, str):
        given = sizes.items() if isinstance(sizes, dict) else {"data": 4, "fsdp": 2}.items()
        example = ",".join(f"{name}={size}" for name, size in given)
        raise ValueError(
            f"`mesh` must be a text of names and sizes; got {described(sizes)}. Write {example!r}."
        )
    found: dict[str, int] = {}
    for part in filter(None, (text.strip() for text in sizes.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise ValueError(
                f"`mesh` must be made of the axes {', '.join(AXES)}, such as 'data=4,fsdp=2'; got "
                f"{name!r} in {sizes!r}."
            )
        if name in found:
            raise ValueError(f"`mesh` gives {name!r} twice in {sizes!r}; keep one of them.")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"`mesh` must give positive integers as sizes, such as 'data=4,fsdp=2'; got "
                f"{part!r} in {sizes!r}."
            )
        found[name] = int(size)
    # Programs for meshes without experts are then the same as before there was an axis for them.
    return {name: found.get(name, 1) for name in AXES if name != EXPERT or name in found}


def rows_in(mesh: Mesh) -> tuple[str, ...]:
    """The axes of a mesh over which the rows of a batch are split, together."""
    return tuple(name for name in ROWS if name in mesh.axis_names)


def size_of(mesh: Mesh, axes: str | Sequence[str] | None) -> int:
    """The product of the sizes of these axes; an axis that the mesh does not have counts as 1."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape.get(name, 1) for name in names)
