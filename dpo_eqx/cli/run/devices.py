"""Places the arrays of a run on one device, or on the mesh that `--mesh` asks for.

`hosts.py` connects processes and compares their settings.
"""

from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from ... import sharding
from ..._jax.partitioning import ROWS
from ...sharding._mesh import rows_in, size_of
from ..settings.settings import Settings

Tree = TypeVar("Tree", bound=PyTree)


def mesh_of(settings: Settings) -> Mesh | None:
    """The mesh of the run; `None` for a single process without `--mesh`.

    **Raises:**

    `ValueError` if the mesh does not fit the devices, or the batch does not fit the mesh.
    """
    if settings.mesh is None and jax.process_count() == 1:
        return None
    mesh = sharding.make_mesh(settings.mesh or f"data={jax.device_count()}")
    count = size_of(mesh, ROWS)
    pairs = settings.batch_size // settings.microbatches
    # Packed batches are split by rows, whose number is made to fit.
    if pairs % count and not settings.pack:
        raise ValueError(
            "`--batch-size` over `--microbatches` must be a multiple of "
            f"{' * '.join(rows_in(mesh))} = {count}, so that each device gets the same number of "
            f"pairs; got {settings.batch_size} over {settings.microbatches}, which is {pairs} "
            "pairs. Change the batch size, the microbatches or the mesh."
        )
    return mesh


def check_rows(batch_size: int, mesh: Mesh | None) -> None:
    """Raises `ValueError` if `--batch-size` cannot be split equally over the mesh."""
    if mesh is not None and batch_size % size_of(mesh, ROWS):
        raise ValueError(
            f"`--batch-size` must be a multiple of {' * '.join(rows_in(mesh))} = "
            f"{size_of(mesh, ROWS)}, so that each device gets the same number of rows; got "
            f"{batch_size}. Change the batch size or the mesh."
        )


def share(mesh: Mesh | None) -> tuple[int, int]:
    """The number of the part of each batch that this process makes, and the number of parts."""
    return (0, 1) if mesh is None else sharding.batch_share(mesh)


def parts(mesh: Mesh | None) -> dict[str, Any]:
    """The arguments of `make_batches` that say how processes and devices split a batch."""
    return {"share": share(mesh), "split": 1 if mesh is None else size_of(mesh, ROWS)}


def put(tree: Tree, mesh: Mesh | None) -> Tree:
    """`tree` with its arrays sharded over `mesh`, or committed to their devices without a mesh.

    Arrays from a checkpoint are committed. If new arrays are, too, then a run that starts and a run
    that continues execute the same program.
    """
    if mesh is not None:
        return sharding.shard_policy(tree, mesh)

    def commit(leaf):
        return jax.device_put(leaf, leaf.sharding) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(commit, tree)


def put_batch(batch: Any, mesh: Mesh | None) -> Any:
    """The global batch; `batch` is the part of it that this process made."""
    return batch if mesh is None else sharding.shard_batch(batch, mesh)


def keep_rows_of(batch: Tree, mesh: Mesh | None) -> Tree:
    """A batch that a jitted function has made of others, split over the mesh like these."""
    if mesh is None:
        return batch
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, P(rows_in(mesh))))
