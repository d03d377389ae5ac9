"""Where the arrays of a run lie: on one device, or on the mesh that `--mesh` asks for.

Processes and what they have to agree on are in `hosts.py`.
"""

from typing import Any, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from ... import sharding
from ..._jax.partitioning import ROWS
from ...sharding._mesh import size_of
from ..settings.settings import Settings

Tree = TypeVar("Tree", bound=PyTree)


def mesh_of(settings: Settings) -> Mesh | None:
    """The mesh of the run; `None` where it is one process that asks for none.

    **Raises:**

    `ValueError` where it does not fit the devices, or the batch does not fit it.
    """
    if settings.mesh is None and jax.process_count() == 1:
        return None
    mesh = sharding.make_mesh(settings.mesh or f"data={jax.device_count()}")
    count = size_of(mesh, ROWS)
    pairs = settings.batch_size // settings.microbatches
    if pairs % count:
        raise ValueError(
            f"`--batch-size` over `--microbatches` must be a multiple of data * fsdp = {count}, so "
            f"that each device has as many pairs; got {settings.batch_size} over "
            f"{settings.microbatches}, {pairs} pairs. Choose another size of either."
        )
    return mesh


def share(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of each batch this process makes, and of how many."""
    return (0, 1) if mesh is None else sharding.batch_share(mesh)


def put(tree: Tree, mesh: Mesh | None) -> Tree:
    """`tree` with its arrays committed to where they are to be, as those of a checkpoint are.

    So a run that goes on has the very program of one that begins.
    """
    if mesh is not None:
        return sharding.shard_policy(tree, mesh)

    def commit(leaf):
        return jax.device_put(leaf, leaf.sharding) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(commit, tree)


def put_batch(batch: Any, mesh: Mesh | None) -> Any:
    """The global batch, of which this process has made its part."""
    return batch if mesh is None else sharding.shard_batch(batch, mesh)
