"""Meshes, and where on them parameters and batches lie; a step itself knows nothing of it.

What is taken and returned are ordinary arrays and `NamedSharding`s.
"""

from ._batch import batch_share as batch_share, shard_batch as shard_batch
from ._mesh import make_mesh as make_mesh
from ._policy import gather as gather, placement as placement, shard_policy as shard_policy
from ._rules import TRANSFORMER as TRANSFORMER, either as either, stacked as stacked
