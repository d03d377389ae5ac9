"""Meshes, and where on them parameters and batches lie; a step itself knows nothing of it.

What is taken and returned are ordinary arrays and `NamedSharding`s.
"""

from .batch import batch_share as batch_share, shard_batch as shard_batch
from .mesh import make_mesh as make_mesh
from .policy import gather as gather, placement as placement, shard_policy as shard_policy
from .rules import TRANSFORMER as TRANSFORMER, either as either, stacked as stacked
