"""What changes while a run goes on, and which part of it a checkpoint holds.

How it changes is in `loop.py`; how it is written is in `checkpoints.py`.
"""

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray, PyTree


class State(eqx.Module):
    """The policy, the optimiser's state, the reference if there is one to run, and the key.

    **Arguments:**

    - `key`: from which each step has its own, for dropout.
    """

    policy: PyTree
    opt_state: PyTree
    reference: PyTree
    key: PRNGKeyArray


def to_save(state: State, trainable: PyTree, *, moving_reference: bool) -> dict[str, PyTree]:
    """The arrays that a run changes: what is frozen comes from the model again."""
    return {
        "policy": eqx.filter(state.policy, trainable),
        "optimizer": eqx.filter(state.opt_state, eqx.is_array),
        "reference": eqx.filter(state.reference, eqx.is_array) if moving_reference else None,
        "key": jax.random.key_data(state.key),
    }


def restored(state: State, saved: dict[str, PyTree]) -> State:
    """`state` with the arrays of `saved`, which `to_save` gave, in their places."""
    return State(
        eqx.combine(saved["policy"], state.policy),
        eqx.combine(saved["optimizer"], state.opt_state),
        eqx.combine(saved["reference"], state.reference) if saved["reference"] else state.reference,
        jax.random.wrap_key_data(saved["key"]),
    )
