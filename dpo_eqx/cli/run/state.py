"""The state of a run, and the part of it that a checkpoint holds.

`loop.py` changes the state, and `checkpoints.py` writes it.
"""

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree


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
