"""The compiled step of a decoder on a mesh, arguments and all, for tests and benchmarks."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

import dpo_eqx as dpx
from dpo_eqx import losses, models, sharding
from dpo_eqx.sharding._mesh import rows_in

CONFIG = models.Config(vocab=1088, width=64, layers=4, heads=8, remat=True)


def compiled_step(
    mesh, *, config=CONFIG, pairs=16, prompt=24, completion=16, chunk_size=48, optimizer=None
):
    """A step of DPO with a live reference, compiled for `mesh` or, where it is `None`, one device.

    Nothing is allocated: shapes are enough.
    """
    train, arguments = _step(config, pairs, prompt, completion, chunk_size, optimizer)
    # Optax's Adam does not keep to strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(train, donate_argnums=(0, 1)).lower(*placed(arguments, mesh))
    return lowered.compile()


def mapped_step(
    mesh, *, config=CONFIG, pairs=16, prompt=24, completion=16, chunk_size=48, optimizer=None
):
    """The same by `shard_map`: the rows over `data`, everything else on every device."""
    train, arguments = _step(
        config, pairs, prompt, completion, chunk_size, optimizer, axis_name="data"
    )
    specs = (P(), P(), P("data"), P())
    mapped = jax.shard_map(train, mesh=mesh, in_specs=specs, out_specs=P())
    here = [jax.sharding.NamedSharding(mesh, spec) for spec in specs]
    put = [
        jax.tree.map(lambda x, h=h: _with(x, h), a) for a, h in zip(arguments, here, strict=True)
    ]
    with jax.numpy_dtype_promotion("standard"):
        lowered = jax.jit(mapped, donate_argnums=(0, 1)).lower(*put)
    return lowered.compile()


def shapes_of_step(
    config=CONFIG, pairs=16, prompt=24, completion=16, chunk_size=48, optimizer=None, **options
):
    """A step of DPO, and the shapes of its policy, its optimiser's state and its batch."""
    optimizer = optax.adam(1e-3) if optimizer is None else optimizer
    score = functools.partial(dpx.score_pairs, chunk_size=chunk_size)
    step = dpx.make_step(losses.dpo, optimizer, score=score, **options)
    make = functools.partial(models.Transformer, config)
    policy = eqx.filter_eval_shape(make, key=jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        opt_state = eqx.filter_eval_shape(optimizer.init, eqx.filter(policy, _is_shape))
    return step, policy, opt_state, _batch(pairs, prompt, completion)


def _is_shape(leaf):
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _step(*sizes, **options):
    """A function of parameters, optimiser state, batch and reference, and their shapes."""
    step, policy, opt_state, batch = shapes_of_step(*sizes, **options)
    params, rest = eqx.partition(policy, _is_shape)

    def train(params, opt_state, batch, reference):
        whole, beside = eqx.combine(params, rest), eqx.combine(reference, rest)
        trained, opt_state, metrics = step(whole, opt_state, batch, beside)
        return eqx.filter(trained, eqx.is_array), opt_state, metrics

    return train, (params, opt_state, batch, params)


def placed(arguments, mesh):
    """The shapes of `(policy, opt_state, batch, reference)` with their shardings."""
    if mesh is None:
        return arguments
    policy, opt_state, batch, reference = arguments
    place = sharding.placement(mesh)
    rows = jax.sharding.NamedSharding(mesh, P(rows_in(mesh)))

    def by_rules(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return _with(leaf, place(name, leaf)) if hasattr(leaf, "shape") else leaf

    params = jax.tree_util.tree_map_with_path(by_rules, (policy, opt_state, reference))
    policy, opt_state, reference = params
    return policy, opt_state, jax.tree.map(lambda x: _with(x, rows), batch), reference


def peak(compiled):
    """Bytes that one device needs: arguments, temporaries and what is not written over them."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _with(leaf, where):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _batch(pairs, prompt, completion):
    def tokens(width):
        return dpx.Tokens(np.zeros((pairs, width), np.int32), np.ones((pairs, width), bool))

    batch = dpx.PreferenceBatch(
        tokens(prompt), tokens(completion), tokens(completion), np.ones(pairs, np.float32)
    )
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)), batch)
