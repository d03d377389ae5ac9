"""Makes meshes with the axes `data`, `fsdp` and `tensor` from their sizes.

`_rules.py`, `_policy.py` and `_batch.py` put arrays on them.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from .._jax.describe import described
from .._jax.partitioning import AXES


def make_mesh(sizes: str, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the axes `data`, `fsdp` and `tensor`, in this order.

    ```python
    mesh = sharding.make_mesh("data=4,fsdp=2")
    ```

    The pairs of a batch are sharded over `data` and `fsdp`; parameters and the optimiser's state
    over `fsdp`; heads, feed-forward layers and the vocabulary over `tensor`.

    **Arguments:**

    - `sizes`: the size of each axis, by name; an axis that is left out has size 1.
    - `devices`: the devices of the mesh; by default all devices, including the devices of
        other processes.

    **Returns:**

    A `jax.sharding.Mesh` with automatic axes, for `eqx.filter_jit(step)` and for `shard_map`.

    **Raises:**

    `ValueError` if an axis is unknown or given twice, if a size is not a positive integer, or if
    the product of the sizes is not the number of devices.
    """
    shape = parse_sizes(sizes)
    devices = jax.devices() if devices is None else list(devices)
    if math.prod(shape) != len(devices):
        product = " * ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True))
        raise ValueError(
            f"`mesh` must have as many places as there are devices, {len(devices)}; {product} "
            f"makes {math.prod(shape)}. Change a size so that the product is {len(devices)}."
        )
    # `jax.make_mesh` makes explicit axes by default, on which `partitioning.py` has no effect.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parse_sizes(sizes: str) -> tuple[int, ...]:
    """The sizes of `data`, `fsdp` and `tensor` in `"data=4,fsdp=2"`; raises as `make_mesh`."""
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
    return tuple(found.get(name, 1) for name in AXES)


def size_of(mesh: Mesh, axes: str | Sequence[str] | None) -> int:
    """The product of the sizes of these axes; an axis that the mesh does not have counts as 1."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape.get(name, 1) for name in names)
