"""The state of a run, and the part of it that a checkpoint holds.

`loop.py` changes the state, and `checkpoints.py` writes it.
"""

import equinox as eqx
import jax
import optax.contrib
import optax.tree_utils
from jaxtyping import PRNGKeyArray, PyTree

from ..._jax.dtypes import in_dtypes_of, in_float32_at_least
from .offload import in_host_memory, on_devices


class State(eqx.Module):
    """Everything that changes during a run, except the position in the data.

    **Arguments:**

    - `policy`: the policy in training.
    - `opt_state`: the state of the optimiser.
    - `reference`: the reference if it is a policy of its own, else `None`.
    - `key`: the random key; each step derives its own key for dropout.
    """

    policy: PyTree
    opt_state: PyTree
    reference: PyTree
    key: PRNGKeyArray


def offloaded(state: State, *, reference: bool, optimizer: bool) -> State:
    """The state with its reference, its optimiser's state or both in the memory of the host."""
    held, opt_state = state.reference, state.opt_state
    return State(
        state.policy,
        in_host_memory(opt_state, "--optimizer-offload") if optimizer else opt_state,
        in_host_memory(held, "--reference-offload") if reference else held,
        state.key,
    )


def averaged(state: State) -> PyTree:
    """The policy that is evaluated, saved and shown.

    It is the policy itself, except for a schedule-free optimiser: that takes its gradients at other
    parameters than those that it has averaged, and these are the better ones.
    """
    schedule_free = optax.tree_utils.tree_get(state.opt_state, "ScheduleFreeState")
    return (
        state.policy
        if schedule_free is None
        else _averaged(state.policy, on_devices(schedule_free))
    )


def evaluated(state: State) -> State:
    """The state with `averaged` for its policy, and with its reference on the devices."""
    return State(averaged(state), state.opt_state, on_devices(state.reference), state.key)


@eqx.filter_jit
def _averaged(policy: PyTree, schedule_free: optax.contrib.ScheduleFreeState) -> PyTree:
    z = schedule_free.z
    is_trained = jax.tree.map(lambda x: x is not None, z, is_leaf=lambda x: x is None)
    params, frozen = eqx.partition(policy, is_trained)
    wide_params, wide_state = in_float32_at_least((params, schedule_free))
    wide = optax.contrib.schedule_free_eval_params(wide_state, wide_params)
    return eqx.combine(in_dtypes_of(wide, params), frozen)


def to_save(state: State, trainable: PyTree, *, moving_reference: bool) -> dict[str, PyTree]:
    """The arrays that a run changes. A continued run loads frozen arrays from the model again."""
    return {
        "policy": eqx.filter(state.policy, trainable),
        "optimizer": eqx.filter(state.opt_state, eqx.is_array),
        "reference": eqx.filter(state.reference, eqx.is_array) if moving_reference else None,
        "key": jax.random.key_data(state.key),
    }


def restored(state: State, saved: dict[str, PyTree]) -> State:
    """`state` with the arrays of `saved`, which `to_save` returned, in place of its own."""
    return State(
        eqx.combine(saved["policy"], state.policy),
        eqx.combine(saved["optimizer"], state.opt_state),
        eqx.combine(saved["reference"], state.reference) if saved["reference"] else state.reference,
        jax.random.wrap_key_data(saved["key"]),
    )
