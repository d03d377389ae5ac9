"""Meshes, and how parameters and batches are sharded over them.

The functions take and return ordinary arrays and `NamedSharding`s; a step does not depend on them.
`plan` says what a step needs of each device.
"""

from ._batch import batch_share as batch_share, shard_batch as shard_batch
from ._mesh import make_mesh as make_mesh
from ._plan import Plan as Plan, plan as plan
from ._policy import gather as gather, placement as placement, shard_policy as shard_policy
from ._rules import TRANSFORMER as TRANSFORMER, either as either, stacked as stacked
