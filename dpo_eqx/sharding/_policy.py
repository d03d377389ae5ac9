"""Parameters and optimiser states put on a mesh by rules, and brought back whole.

Which rule says what is in `_rules.py`.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from ._rules import TRANSFORMER, Rules, spec_of

Tree = TypeVar("Tree")


def placement(
    mesh: Mesh, *, rules: Rules | None = None
) -> Callable[[str, jax.ShapeDtypeStruct | jax.Array | np.ndarray], NamedSharding]:
    """Where each leaf lies, as `models.load(path, sharding=placement(mesh))` asks for it.

    **Arguments:**

    - `mesh`, `rules`: as for `shard_policy`.

    **Returns:**

    A function of the path of a leaf, `"layers.attention.query.weight"`, and of anything that has
    its shape, to a `NamedSharding`. It raises what `shard_policy` does.
    """
    rules = TRANSFORMER if rules is None else rules

    def place(path: str, leaf: jax.ShapeDtypeStruct | jax.Array | np.ndarray) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path, leaf.shape, mesh, rules))

    return place


def shard_policy(policy: Tree, mesh: Mesh, *, rules: Rules | None = None) -> Tree:
    """The arrays of any pytree on the mesh: a policy, a reference, an optimiser's state.

    ```python
    mesh = sharding.make_mesh("fsdp=8")
    policy = sharding.shard_policy(policy, mesh)
    opt_state = sharding.shard_policy(optimizer.init(eqx.filter(policy, trainable)), mesh)
    ```

    Rules are tried in their order, and the first whose pattern is found in a leaf's path applies.
    So one rule is for a parameter and for its moments in the optimiser's state, whose paths end
    alike. A leaf that no rule matches has its largest axis that divides on `fsdp`, or is
    replicated where it has fewer than 4096 numbers. What lies under an attribute `layers` without
    an index is taken to be stacked along its first axis, which is never split: a loop over layers
    reads one of them at a time.

    **Arguments:**

    - `policy`: a pytree; what is not an array in it stays.
    - `mesh`: from `make_mesh`, or any other.
    - `rules`: from regular expressions, searched in paths such as
        `"layers.attention.query.weight"`, to a `PartitionSpec` of a leaf's *trailing* axes, or to a
        function of its shape and the mesh such as `stacked` or `either(...)`. By default
        `TRANSFORMER`; `{**rules, **sharding.TRANSFORMER}` adds to them. A specification longer
        than a leaf, or than what is left of it in a stack, does not apply to it.

    **Returns:**

    The same pytree of arrays with `NamedSharding`s. Over several processes each gives the same
    values, and keeps its own part of them.

    **Raises:**

    `ValueError` where a rule names an axis that the mesh does not have, or one that does not
    divide.
    """
    place = placement(mesh, rules=rules)

    def put(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return put_on(leaf, place(name, leaf)) if isinstance(leaf, jax.Array | np.ndarray) else leaf

    return jax.tree_util.tree_map_with_path(put, policy)


def gather(tree: Tree) -> Tree:
    """The arrays of a sharded pytree, whole, in NumPy, on every process.

    One leaf after the other, so that no device ever holds more than one of them whole.
    """

    def whole(leaf):
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(whole, tree)


def put_on(leaf: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """One array on a mesh, which other processes may have parts of."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = put_on(jax.random.key_data(leaf), NamedSharding(sharding.mesh, P()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or is_global:
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
