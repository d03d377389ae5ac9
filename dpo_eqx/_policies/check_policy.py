"""Checks a policy before it is trained, and reports what is wrong with it.

The checks are in `probes.py`, `recurrence_probe.py` and `training_probes.py`, the report is in
`report.py`.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from .._jax.dtypes import is_narrow
from .._jax.inference_mode import in_inference
from .._jax.paths import leaf_name
from .._scoring.adapter_lines import only_needs_key
from .._scoring.policy_checks import call_policy, check_is_policy
from .._scoring.predict import offers_fast_path, offers_recurrence
from .probes import (
    Probe,
    check_causality,
    check_dependence,
    check_determinism,
    check_dtype,
    check_fast_path,
    check_keys,
    check_padding,
    check_values,
    check_vmap,
    check_vocabulary,
    few,
    summary,
)
from .recurrence_probe import check_recurrence
from .report import PolicyReport, TrainedArray
from .training_probes import check_buffers, check_gradients

CHECKS: dict[str, Callable[[Probe], Iterator[str]]] = {
    "the logits are finite": check_values,
    "the dtype of the logits": check_dtype,
    "one logit for each token": check_vocabulary,
    "causality": check_causality,
    "each logit sees its token": check_dependence,
    "padding does not leak": check_padding,
    "determinism": check_determinism,
    "jit and vmap": check_vmap,
    "the call in training": check_keys,
    "the fast path": check_fast_path,
    "start and extend": check_recurrence,
    "finite gradients": check_gradients,
    "no table or state is trained": check_buffers,
}

# Checks of what a policy may offer; the others are for all policies.
PROTOCOLS = {"the fast path": offers_fast_path, "start and extend": offers_recurrence}


def check_policy(
    policy: PyTree,
    vocab: int | None = None,
    *,
    length: int = 16,
    key: PRNGKeyArray | None = None,
    trainable: PyTree = eqx.is_inexact_array,
) -> PolicyReport:
    """Checks that a policy keeps the contract: shapes, causality, padding, randomness, gradients.

    ```python
    report = dpx.check_policy(policy, vocab=len(tokenizer))
    print(report)
    report.raise_if_problems()
    ```

    It runs the policy on a few rows of random tokens, on the host, outside of any transformation.
    It cannot prove that a policy is right, but finds the faults that are common.

    **Arguments:**

    - `policy`: the policy, also one from `adapt`.
    - `vocab`: the number of tokens (default: the number of logits that the policy returns).
    - `length`: the number of tokens in a row, at least 4.
    - `key`: a key for dropout and for the tokens (default: `jax.random.key(0)`).
    - `trainable`: the filter that the step will get.

    **Returns:**

    A `PolicyReport`. A policy that fails, or returns no logits, gives a report with that problem.

    **Raises:**

    `ValueError` if `length` is less than 4.
    """
    if length < 4:
        raise ValueError(f"`length` must be at least 4; got {length}. Leave it out to use 16.")
    key = jax.random.key(0) if key is None else key
    name, notes, trained = _name(policy), _notes(policy, trainable), _trained(policy, trainable)
    problems, passed = [], []
    try:
        probe = _probe(policy, vocab, length, key, trainable)
    except Exception as error:  # the policy's own error, of any class
        return PolicyReport(name, (summary(error),), notes, (), trained)
    if only_needs_key(policy, probe.ids):
        notes += ("It needs a `key` in training: pass `key=` to the step, a new one each time.",)
    for subject, check in _checks(policy).items():
        try:
            found = list(check(probe))
        except Exception as error:  # the policy's own error, of any class
            found = [f"The check of {subject} failed: {summary(error)}"]
        problems += found
        passed += [] if found else [subject]
    return PolicyReport(name, tuple(problems), notes, tuple(passed), trained)


def _checks(policy: PyTree) -> dict[str, Callable[[Probe], Iterator[str]]]:
    """All checks but those of a protocol that the policy does not offer."""
    return {
        subject: check
        for subject, check in CHECKS.items()
        if subject not in PROTOCOLS or PROTOCOLS[subject](policy)
    }


def _probe(policy: PyTree, vocab: int | None, length: int, key: Any, trainable: PyTree) -> Probe:
    check_is_policy(policy)
    zeros = jnp.zeros(length, jnp.int32)
    logits = eqx.filter_eval_shape(call_policy, in_inference(policy), zeros, None)
    vocab = logits.shape[-1] if vocab is None else vocab
    ids = np.asarray(jax.random.randint(key, (length,), 0, vocab, jnp.int32))
    return Probe(policy, ids, vocab, key, _takes_key(policy), trainable)


def _takes_key(policy: PyTree) -> bool:
    try:
        inspect.signature(policy).bind(None, key=None)
    except (TypeError, ValueError):
        return False
    return True


def _name(policy: PyTree) -> str:
    inner = getattr(policy, "model", None)
    name = type(policy).__name__
    return f"{name}({type(inner).__name__})" if name.endswith("Adapted") else name


def _notes(policy: PyTree, trainable: PyTree) -> tuple[str, ...]:
    params = jax.tree_util.tree_leaves_with_path(eqx.filter(policy, trainable))
    hosts = [leaf_name(path) for path, leaf in params if isinstance(leaf, np.ndarray)]
    found = []
    if hosts:
        found.append(
            f"NumPy arrays are trained as JAX arrays are: {few(hosts)}. If they are constants, "
            "leave them out by `trainable=dpx.trainable(policy, without=...)`."
        )
    narrow = [leaf_name(path) for path, leaf in params if is_narrow(leaf)]
    if narrow:
        found.append(
            f"Parameters are trained in half precision: {few(narrow)}. At the learning rates of "
            "preference training, most updates are then rounded away: wrap the optimiser in "
            "`dpx.master_weights`, or train them in float32 with `compute_dtype=` of the step."
        )
    if offers_fast_path(policy):
        found.append("It offers `FastPolicy`: prompts are read once, and no logits are built.")
    elif offers_recurrence(policy):
        found.append("It offers `RecurrentPolicy`: prompts are read once for all completions.")
    else:
        found.append(
            "It offers neither `FastPolicy` nor `RecurrentPolicy`: prompts are read again for each "
            "completion."
        )
    if callable(policy) and not _takes_key(policy):
        found.append("It takes no `key`: give none to the step.")
    return tuple(found)


def _trained(policy: PyTree, trainable: PyTree) -> tuple[TrainedArray, ...]:
    params = eqx.filter(policy, trainable)
    return tuple(
        # A NumPy array in float64 becomes float32 in a step, unless x64 is on.
        TrainedArray(leaf_name(path), leaf.shape, str(jax.dtypes.canonicalize_dtype(leaf.dtype)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    )
