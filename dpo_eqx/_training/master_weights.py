"""Master weights: float32 copies of narrow parameters, kept in the optimiser's state.

The rounding to the parameters' dtype is here; the inner optimiser computes the update.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .._jax.dtypes import in_float32_at_least, is_narrow


class MasterWeightsState(eqx.Module):
    """The state of `master_weights`.

    **Arguments:**

    - `master`: like the parameters, with a float32 copy of each narrow array and `None` elsewhere.
    - `inner`: the state of the inner optimiser, made for the float32 copies.
    - `dtypes`: the dtype of each parameter whose copy is in `master`, in the order of its leaves.
    """

    master: PyTree
    inner: PyTree
    dtypes: tuple[str, ...] = eqx.field(static=True)


def master_weights(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps float32 copies of bfloat16 and float16 parameters, and lets `optimizer` train those.

    ```python
    optimizer = dpx.master_weights(optax.adamw(1e-6))
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    step = dpx.make_step(loss, optimizer)
    ```

    bfloat16 has 8 significant bits, so an update of less than about 1/500 of a parameter is
    rounded away. At the learning rates of preference training that is nearly every update. With
    master weights, small updates add up in float32. After each step the parameters are the rounded
    copies, bit for bit. Training is then equivalent to training float32 parameters with
    `compute_dtype` set to the narrow dtype.

    The copies cost 4 bytes per parameter, and the inner state is in float32, too. Float32
    parameters are not copied. If something else has changed a parameter, so that it is no longer
    its rounded copy, the copy starts again from the parameter.

    **Arguments:**

    - `optimizer`: an Optax transformation, with or without extra arguments. Put everything that
        changes the updates inside: `master_weights(optax.chain(clip, adamw))`.

    **Returns:**

    A transformation whose updates are float32. In a loop of your own, apply them by
    `optax.apply_updates`, which adds in float32 and rounds once. (`eqx.apply_updates` does not
    round: it would turn the parameters into float32.)

    **Raises:**

    `ValueError` if `update` is called without `params`.

    ??? cite

        Micikevicius et al., *Mixed Precision Training*, ICLR 2018, section 3.1 (arXiv 1710.03740).
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> Any:
        narrow = eqx.filter(params, is_narrow)
        dtypes = tuple(str(leaf.dtype) for leaf in jax.tree.leaves(narrow))
        # Cast twice: the inner state may hold its parameters, and a donated state must not hold
        # the same buffer twice.
        return MasterWeightsState(
            in_float32_at_least(narrow), inner.init(in_float32_at_least(params)), dtypes
        )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError(
                "`params` must be given to the update of `master_weights`; got None. Call "
                "`optimizer.update(updates, state, params)`."
            )
        wide = in_float32_at_least(params)
        dtypes = jax.tree.unflatten(jax.tree.structure(state.master), state.dtypes)
        master = jax.tree.map(_follow, state.master, dtypes, _beside(state.master, wide))
        updates, inner_state = inner.update(
            in_float32_at_least(updates), state.inner, eqx.combine(master, wide), **extra_args
        )
        master = optax.apply_updates(master, updates)
        # The sum of `old` and this difference is the rounded copy. Float32 represents the
        # difference of two narrow numbers exactly unless one is tiny compared with the other. If
        # the old number is tiny, the sum still rounds to the new number. If the new number is tiny,
        # it is a multiple of the old copy's spacing, because its copy is a float32 sum, so nothing
        # is lost either. (The only exception: an old copy that rounds up to a power of two, and
        # crosses 0 to less than 2^-15 of it, may be off by its own spacing. `_follow` then starts
        # from the parameter.)
        steps = jax.tree.map(
            lambda copy, dtype, old: _rounded(copy, dtype) - old,
            master,
            dtypes,
            _beside(master, wide),
        )
        state = MasterWeightsState(master, inner_state, state.dtypes)
        return eqx.combine(steps, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _beside(master: PyTree, tree: PyTree) -> PyTree:
    """The leaves of `tree` at the arrays of `master`, and `None` elsewhere."""
    return jax.tree.map(
        lambda copy, leaf: None if copy is None else leaf, master, tree, is_leaf=lambda x: x is None
    )


def _follow(copy: Array, dtype: str, param: Array) -> Array:
    """The copy, or the parameter if it is no longer the rounded copy."""
    return jnp.where(_rounded(copy, dtype) == param, copy, param)


def _rounded(x: Array, dtype: str) -> Array:
    """`x` rounded to `dtype`, in its own dtype.

    Two casts would not do this reliably: XLA may remove them and keep the excess precision.
    """
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if info.nexp == jnp.finfo(x.dtype).nexp:
        return rounded
    # A cast keeps subnormal numbers, which `reduce_precision` flushes to 0.
    spacing = float(info.smallest_subnormal)
    return jnp.where(
        jnp.abs(x) < float(info.smallest_normal), jnp.round(x / spacing) * spacing, rounded
    )
