"""Puts parameters and optimiser states on a mesh by rules, and gathers them again.

The rules are in `_rules.py`.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from .._jax.paths import leaf_name
from ._rules import TRANSFORMER, Rules, spec_of

Tree = TypeVar("Tree")


def placement(
    mesh: Mesh, *, rules: Rules | None = None
) -> Callable[[str, jax.ShapeDtypeStruct | jax.Array | np.ndarray], NamedSharding]:
    """The sharding of each leaf, as a function for `models.load(path, sharding=placement(mesh))`.

    **Arguments:**

    - `mesh`, `rules`: as for `shard_policy`.

    **Returns:**

    A function that takes the path of a leaf, such as `"layers.attention.query.weight"`, and any
    object with the leaf's shape, and returns a `NamedSharding`. It raises as `shard_policy`.
    """
    rules = TRANSFORMER if rules is None else rules

    def place(path: str, leaf: jax.ShapeDtypeStruct | jax.Array | np.ndarray) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path, leaf.shape, mesh, rules))

    return place


def shard_policy(policy: Tree, mesh: Mesh, *, rules: Rules | None = None) -> Tree:
    """Puts the arrays of a pytree on the mesh: a policy, a reference or an optimiser's state.

    ```python
    mesh = sharding.make_mesh("fsdp=8")
    policy = sharding.shard_policy(policy, mesh)
    opt_state = sharding.shard_policy(optimizer.init(eqx.filter(policy, trainable)), mesh)
    ```

    Rules are tried in their order, and the first rule whose pattern is found in a leaf's path
    applies. The path of a parameter's moments in the optimiser's state ends in the parameter's own
    path, so one rule matches them all. If no rule matches, the leaf's largest axis that divides is
    sharded over `fsdp`; a leaf of fewer than 4096 numbers is replicated. Leaves under an attribute
    `layers` without an index count as stacked along their first axis. That axis is never sharded,
    because a loop over layers reads one layer at a time.

    **Arguments:**

    - `policy`: a pytree; leaves that are not arrays are unchanged.
    - `mesh`: from `make_mesh`, or any other mesh.
    - `rules`: a mapping from regular expressions, searched in paths such as
        `"layers.attention.query.weight"`, to a `PartitionSpec` of a leaf's *trailing* axes, or to a
        function of its shape and the mesh such as `stacked` or `either(...)`. By default
        `TRANSFORMER`; `{**rules, **sharding.TRANSFORMER}` adds rules to it. A specification does
        not apply to a leaf with fewer axes, not counting the axis of a stack.

    **Returns:**

    The same pytree of arrays with `NamedSharding`s. With several processes, each process passes the
    same values, and keeps its own shards.

    **Raises:**

    `ValueError` if a rule names an axis that the mesh does not have, or one that does not divide.
    """
    place = placement(mesh, rules=rules)

    def put(path, leaf):
        name = leaf_name(path)
        return put_on(leaf, place(name, leaf)) if isinstance(leaf, jax.Array | np.ndarray) else leaf

    return jax.tree_util.tree_map_with_path(put, policy)


def gather(tree: Tree) -> Tree:
    """Gathers the arrays of a sharded pytree into complete NumPy arrays, on every process.

    It gathers one leaf after the other, so that no device holds more than one complete leaf.
    """

    def gathered(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(gathered, tree)


def put_on(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts one array on a mesh, which may span several processes."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = put_on(jax.random.key_data(leaf), NamedSharding(sharding.mesh, P()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or is_global:
        return jax.device_put(leaf, sharding)
    # Every process has all values of an array that is not global, and cuts its shards from them.
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
