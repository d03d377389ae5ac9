"""Log-probabilities of the reference, computed once and stored on disk, keyed by content.

The key covers ids, the reference's weights, the score and the dtype, but not the loss. So a sweep
over losses or `beta` computes them once, and a changed input never finds a stale cache.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import DTypeLike, Float, Int, PyTree

from .._scoring.score import score_pairs
from .._training.reference import precompute_reference
from ..protocols import Score
from ..sharding import batch_share, gather, shard_batch
from ._batches.batches import batches
from ._fingerprint import digest
from ._tokens.rows import Row, Rows, is_single, lengths_of
from ._tokens.store import aside, default_folder, digest_ids, settle

logger = logging.getLogger("dpo_eqx.data")

# Change it if the same input gives other numbers.
_VERSION = 1

LogProbs = Float[np.ndarray, "rows 2"]


class ReferenceRows:
    """Rows with log-probabilities of the reference, which are joined on access."""

    def __init__(self, rows: Rows, log_probs: LogProbs):
        self._rows, self._log_probs = rows, log_probs

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        chosen, rejected = self._log_probs[index].tolist()
        return self._rows[index] | {"reference_chosen": chosen, "reference_rejected": rejected}

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def lengths(self) -> Int[np.ndarray, "rows parts"]:
        """The tokens of each row's prompt and of each of its completions."""
        return lengths_of(self._rows)


def cache_reference(
    reference: PyTree,
    rows: Rows,
    *,
    batch_size: int = 8,
    score: Score = score_pairs,
    compute_dtype: DTypeLike | None = None,
    microbatches: int = 1,
    folder: str | Path | None = None,
    mesh: Mesh | None = None,
) -> ReferenceRows:
    """`rows` with the reference's log-probabilities, so that training needs no reference.

    `precompute_reference` computes them once. A later call with the same rows, reference, `score`
    and `compute_dtype` reads them from disk, for any loss, batch size, `weight` or `beta`. Batches
    of the result hold them as `batch.reference`.

    **Arguments:**

    - `reference`: a policy.
    - `rows`: rows of pairs, from `tokenize`.
    - `batch_size`, `microbatches`: the number of rows scored at once, and of the parts it is
        split into.
    - `score`, `compute_dtype`: as for the step.
    - `folder`: the folder of the caches; `None` is `$DPO_EQX_CACHE`, or the user's cache folder.
    - `mesh`: the mesh that `reference` is sharded over, if any. The rows are split over it. Several
        processes must call this together; all compute again if one does not find the cache.

    **Returns:**

    Rows that also hold `reference_chosen` and `reference_rejected`, in nats, summed over tokens.

    **Raises:**

    `ValueError` for unpaired rows: KTO's reference depends on the completions drawn for a run.
    """
    if len(rows) and is_single(rows[0]):
        raise ValueError(
            "`rows` must be pairs, with `chosen_ids` and `rejected_ids`; got unpaired rows. Give "
            "the step a `reference` instead."
        )
    dtype = None if compute_dtype is None else np.dtype(compute_dtype).name
    key = digest(digest_ids(rows), reference, score, dtype)
    folder = Path(folder or default_folder())
    path = folder / f"reference-{_VERSION}-{key}"
    if _is_everywhere(path, mesh):
        logger.info("reference log-probabilities read from %s", path)
    else:

        @eqx.filter_jit
        def run(reference: PyTree, batch: Any):
            return precompute_reference(
                reference,
                batch,
                score=score,
                compute_dtype=compute_dtype,
                microbatches=microbatches,
            )

        log_probs = _compute(lambda batch: run(reference, batch), rows, batch_size, mesh)
        with aside(folder) as temporary:
            np.save(temporary / "log_probs.npy", log_probs)
            path = settle(temporary, path.name)
        logger.info("reference log-probabilities written to %s", path)
    return ReferenceRows(rows, np.load(path / "log_probs.npy", mmap_mode="r"))


def _compute(run: Callable[[Any], Any], rows: Rows, batch_size: int, mesh: Mesh | None) -> LogProbs:
    """The log-probabilities of all rows in their order."""
    index, count = (0, 1) if mesh is None else batch_share(mesh)
    with batches(
        rows, batch_size=batch_size, shuffle=False, process_index=index, process_count=count
    ) as all_batches:
        placed = (batch if mesh is None else shard_batch(batch, mesh) for batch in all_batches)
        results = [run(batch) for batch in placed]
    pairs = [np.stack([part.chosen, part.rejected], axis=1) for part in gather(results)]
    return np.concatenate(pairs)[: len(rows)]


def _is_everywhere(path: Path, mesh: Mesh | None) -> bool:
    """Whether all processes of the mesh find the cache: computing needs all of them."""
    if mesh is None or not mesh.is_multi_process:
        return path.exists()
    return bool(multihost_utils.process_allgather(np.array([path.exists()])).all())
