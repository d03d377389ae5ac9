"""Checks of what a step would train, each a function that yields sentences about faults.

`probes.py` checks what a policy returns.
"""

import re
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._arrays.batches import PreferenceBatch
from .._jax.paths import leaf_name
from .._scoring.score import score_pairs
from .._training.passes import holds
from .probes import Probe, batch_of, few, key_in_training

_TABLES = {"rotary", "rope", "freq", "freqs", "sin", "cos", "sine", "cosine", "alibi"}
_BUFFERS = {"mask", "buffer", "buffers"}


def check_gradients(probe: Probe) -> Iterator[str]:
    """The gradient of the log-probabilities is finite."""
    params, rest = eqx.partition(probe.policy, probe.trainable)
    gradients = _gradients(params, rest, batch_of(probe), key_in_training(probe))
    found = jax.tree_util.tree_leaves_with_path(gradients)
    wrong = [leaf_name(path) for path, leaf in found if not jnp.isfinite(leaf).all()]
    if wrong:
        yield (
            f"The gradient is NaN or infinite at {few(wrong)}. Guard square roots, divisions and "
            "logarithms by `jnp.where` on their input, too."
        )


@eqx.filter_jit
def _gradients(params: PyTree, rest: PyTree, batch: PreferenceBatch, key: Any) -> PyTree:
    # What is not trained is an argument, so that its NumPy arrays are traced, as in a step.
    def total(params):
        log_probs = score_pairs(eqx.combine(params, rest), batch, key=key)
        return log_probs.chosen.sum() - log_probs.rejected.sum()

    return jax.grad(total)(params)


def check_buffers(probe: Probe) -> Iterator[str]:
    """No table or state is trained."""
    params = eqx.filter(probe.policy, probe.trainable)
    found = jax.tree_util.tree_leaves_with_path(params)
    if not found:
        yield (
            "No array would be trained. Parameters are floating-point arrays, in fields that are "
            "not static."
        )
    tables = [leaf_name(path) for path, leaf in found if _is_table(leaf_name(path), leaf)]
    if tables:
        yield (
            f"Arrays would be trained that look like tables or masks: {few(tables)}. Leave them "
            f"out by `trainable=dpx.trainable(policy, without={_pattern(tables[0])!r})`."
        )
    if holds(params, (eqx.nn.State, eqx.nn.StateIndex)):
        yield (
            "The state of a layer (`eqx.nn.State`) would be trained. Hold it frozen, outside of "
            "the model: `dpx.adapt(model, lambda model, ids, key: model(ids, jax.tree.map("
            "jnp.copy, state))[0])`."
        )


def _pattern(path: str) -> str:
    return re.escape(path.rsplit(".", 1)[-1]) + "$"


def _is_table(path: str, leaf: Any) -> bool:
    """Whether an array has the name of a fixed table, or the values of sines and cosines."""
    words = set(re.split(r"[._]", path.lower()))
    name = set(re.split(r"_", path.lower().rsplit(".", 1)[-1]))
    is_mask = bool(name & _BUFFERS) and not name & {"embedding", "token"}
    if words & _TABLES or is_mask:
        return True
    if leaf.ndim != 2 or leaf.shape[0] < 2 or not any("pos" in word for word in words):
        return False
    # Row 0 of a sinusoidal table is made of sin 0 and cos 0; a learned row is not.
    table = np.asarray(leaf)
    return bool(np.isin(table[0], (0, 1)).all() and 0 < np.abs(table).max() <= 1)
