"""Puts batches on a mesh from the rows of each process, and decides which rows each process makes.

Parameters are in `_policy.py`.
"""

from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from .._jax.partitioning import ROWS
from ._mesh import rows_in, size_of

Batch = TypeVar("Batch")


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Puts the global batch on the mesh, from the rows of this process.

    ```python
    index, count = sharding.batch_share(mesh)
    batches = data.batches(rows, batch_size=64, process_index=index, process_count=count)
    batch = sharding.shard_batch(next(batches), mesh)
    ```

    **Arguments:**

    - `batch`: this process's part of the batch, or all of it if there is only one process. A pytree
        of arrays whose first axis is the pairs, such as a `PreferenceBatch` in NumPy, or the rows
        of a `PackedBatch`.
    - `mesh`: from `make_mesh`, or any other mesh with an axis `data`, `fsdp` or `expert`.

    **Returns:**

    The same pytree of global arrays, with the first axis sharded over `data`, `fsdp` and `expert`
    together.

    **Raises:**

    `ValueError` if the rows cannot be split equally over the devices of this process, or the mesh
    has none of these axes.
    """
    _, count = batch_share(mesh)
    here = NamedSharding(mesh, P(rows_in(mesh)))
    for leaf in jax.tree.leaves(batch):
        _check_rows(leaf, mesh, count)

    def put(leaf: Any) -> jax.Array:
        local = np.asarray(leaf)
        kind = jax.dtypes.canonicalize_dtype(local.dtype)
        return jax.make_array_from_process_local_data(here, local.astype(kind, copy=False))

    # `device_put` moves an array between devices directly, without a copy through the host.
    on_devices = here.is_fully_addressable
    return jax.device_put(batch, here) if on_devices else jax.tree.map(put, batch)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """The index of this process's part of each global batch, and the number of parts: `(1, 4)`.

    The index is not the process's number if the axis `tensor` spans several processes, because
    these processes then need the same rows.

    **Raises:**

    `ValueError` if the rows of two processes partly overlap.
    """
    if not rows_in(mesh):
        raise ValueError(
            f"`mesh` must have an axis {' or '.join(ROWS)} for the rows of a batch; got "
            f"{', '.join(mesh.axis_names)}. Make it by `sharding.make_mesh('data=8')`, or put the "
            "batch on this one by `jax.device_put(batch, NamedSharding(mesh, PartitionSpec("
            f"{mesh.axis_names[0]!r})))`."
        )
    # Rows are replicated along all other axes.
    leading = [mesh.axis_names.index(name) for name in rows_in(mesh)]
    devices = np.moveaxis(mesh.devices, leading, range(len(leading)))
    blocks = devices.reshape(size_of(mesh, ROWS), -1)
    held: dict[int, tuple[int, ...]] = {}
    for block, row in enumerate(blocks):
        for process in {device.process_index for device in row}:
            held[process] = (*held.get(process, ()), block)
    shares = sorted(set(held.values()))
    if sum(map(len, shares)) != len(blocks) or len({len(share) for share in shares}) != 1:
        raise ValueError(
            "`mesh` must give all processes equally many rows of a batch, and any two of them "
            f"either the same rows or disjoint ones; got the parts {shares} of {len(blocks)}. Let "
            "`tensor` be a divisor or a multiple of the devices of a process."
        )
    return shares.index(held[jax.process_index()]), len(shares)


def _check_rows(leaf: Any, mesh: Mesh, count: int) -> None:
    if not np.ndim(leaf):
        raise ValueError(
            "`batch` must hold arrays with the rows as their first axis; one of them is a scalar, "
            f"{leaf}. Make it one number for each row, or pass it to the step separately."
        )
    rows, total = np.shape(leaf)[0], size_of(mesh, ROWS)
    if rows == 0 or rows % (total // count):
        found = f"{rows * count}" if count == 1 else f"{rows} in each of {count} parts"
        raise ValueError(
            "`batch` must split equally over the devices: the number of its pairs, or packed rows, "
            f"must be a positive multiple of {' * '.join(rows_in(mesh))} = {total}; got {found}. "
            "Change the batch size (for packed rows also `multiple_of`), pad the batch with pairs "
            "of weight 0, or make these axes smaller."
        )
