"""References: chooses and runs the reference of a step, and makes, precomputes and moves one.

A reference is a policy that does not learn: a separate pytree, a view of the policy, or precomputed
log-probabilities.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, PyTree

from .._arrays.kinds import check_is_batch
from .._arrays.log_probs import PairLogProbs, UnpairedLogProbs
from .._arrays.packed import rows_of
from .._jax.dtypes import at_least_float32, cast, in_dtype
from .._jax.inference_mode import in_inference
from .._jax.microbatches import check_divides, merge, split
from .._jax.partitioning import beside_sweeps
from .._jax.scalars import Number
from .._scoring.policy_checks import as_reference
from .._scoring.score import score_pairs
from ..protocols import Score
from .dependence import dependent_paths

Policy = TypeVar("Policy")


def snapshot(policy: Policy) -> Policy:
    """A copy of `policy` that shares no array with it.

    Take `reference = dpx.snapshot(policy)` before the policy is donated to a jitted step: donated
    arrays must not share buffers with arrays that are used later. Use
    `dpx.snapshot(optimizer.init(...))` for optimisers whose first state holds the parameters
    themselves.
    """
    return jax.tree.map(lambda x: jnp.array(x, copy=True) if eqx.is_array(x) else x, policy)


def sync_reference(reference: Policy, policy: Policy, alpha: Number) -> Policy:
    r"""The reference moved towards the policy, $\alpha \theta + (1 - \alpha) \theta_{ref}$.

    Floating-point arrays are mixed, in float32 at least, and keep the reference's dtype; other
    arrays are copied from the reference. The result shares no buffer with either argument.

    **Arguments:**

    - `reference`, `policy`: pytrees of one structure.
    - `alpha`: 1 replaces the reference, 0 keeps it; a number in `[0, 1]` or a traced scalar.

    **Raises:**

    `ValueError` if `alpha` is out of range or the structures differ.

    ??? cite

        Gorbatovski et al., *Learn Your Reference Model for Real Good Alignment* (TR-DPO), 2024,
        equation 3 (arXiv 2404.09656).
    """
    if isinstance(alpha, Real) and not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1]; got {alpha}.")
    old_arrays, new_arrays = (eqx.filter(tree, eqx.is_array) for tree in (reference, policy))
    if jax.tree.structure(old_arrays) != jax.tree.structure(new_arrays):
        raise ValueError(
            "`reference` and `policy` must have one structure to be mixed; got "
            f"{jax.tree.structure(old_arrays)} and {jax.tree.structure(new_arrays)}."
        )
    moved = jax.tree.map(lambda old, new: _mix(old, new, alpha), old_arrays, new_arrays)
    return eqx.combine(moved, eqx.filter(reference, eqx.is_array, inverse=True))


@overload
def precompute_reference(
    reference: PyTree,
    batch: Any,
    *,
    score: Score[PairLogProbs] = score_pairs,
    compute_dtype: DTypeLike | None = None,
    microbatches: int = 1,
) -> PairLogProbs: ...


@overload
def precompute_reference(
    reference: PyTree,
    batch: Any,
    *,
    score: Score[UnpairedLogProbs],
    compute_dtype: DTypeLike | None = None,
    microbatches: int = 1,
) -> UnpairedLogProbs: ...


@beside_sweeps
def precompute_reference(
    reference: PyTree,
    batch: Any,
    *,
    score: Score = score_pairs,
    compute_dtype: DTypeLike | None = None,
    microbatches: int = 1,
) -> PairLogProbs | UnpairedLogProbs:
    """The reference's log-probabilities of `batch`, to be passed as `batch.reference` later.

    They equal those that a step with the same `score` and `compute_dtype` would compute, because
    the same code runs in inference mode. The function is pure and not jitted; wrap it in
    `eqx.filter_jit`.

    **Arguments:**

    - `reference`: a policy.
    - `batch`: a `PreferenceBatch`, or any batch that `score` takes.
    - `score`: the score that the step uses.
    - `compute_dtype`: the `compute_dtype` of the step.
    - `microbatches`: the number of parts into which the batch is split to save memory.

    **Returns:**

    The result of `score`: `PairLogProbs` or `UnpairedLogProbs`, each array of shape `(pairs,)`.

    **Raises:**

    `ValueError` if `microbatches` does not divide the pairs.
    """
    check_divides(microbatches, rows_of(batch))

    def run(part):
        return run_reference(reference, part, score=score, compute_dtype=compute_dtype)

    return run(batch) if microbatches == 1 else merge(jax.lax.map(run, split(batch, microbatches)))


def run_reference(
    reference: PyTree, batch: Any, *, score: Score, compute_dtype: DTypeLike | None
) -> Any:
    """The reference's log-probabilities, through which no gradient flows."""
    with as_reference():
        log_probs = run_inference(reference, batch, score=score, compute_dtype=compute_dtype)
    return jax.lax.stop_gradient(log_probs)


def run_inference(
    policy: PyTree, batch: Any, *, score: Score, compute_dtype: DTypeLike | None
) -> Any:
    """Log-probabilities of `batch` in inference mode and in the compute dtype."""
    policy = in_dtype(in_inference(policy), compute_dtype)
    return score(policy, batch, key=None)


def choose_reference(
    policy: PyTree,
    batch: Any,
    reference: PyTree | None,
    reference_of: Callable[[Any], Any] | None,
    parts: tuple[PyTree, PyTree] | None = None,
) -> PyTree | None:
    """The policy to run as reference, or `None` if the reference is precomputed or absent.

    **Arguments:**

    - `policy`, `batch`, `reference`, `reference_of`: the arguments of a step.
    - `parts`: the arrays of `policy` that are trained, on which no view may depend, and the rest of
        `policy`.

    **Raises:**

    `ValueError` if there are two references, or the view depends on an array that is trained.
    """
    check_is_batch(batch)
    references = {
        "the argument `reference`": reference,
        "`batch.reference`": batch.reference,
        "`reference_of`": reference_of,
    }
    names = [name for name, value in references.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"Give one reference, not {len(names)}: got {' and '.join(names)}. Drop all but one; "
            "precomputed log-probabilities can be taken out of a batch with "
            "`dataclasses.replace(batch, reference=None)`."
        )
    if reference_of is None:
        return reference
    if parts is not None:
        _check_view(reference_of, *parts)
    return reference_of(policy)


def _check_view(reference_of: Callable[[Any], Any], trained: PyTree, rest: PyTree) -> None:
    """Raises if an array of the view depends on a trained array, through any operations."""
    remedy = (
        "Freeze them by `trainable=`, for instance `models.lora_filter(policy)`, or pass a "
        "`snapshot` as `reference`."
    )
    try:
        paths = dependent_paths(lambda arrays: reference_of(eqx.combine(arrays, rest)), trained)
    except jax.errors.JAXTypeError as error:
        # `np.asarray`, `float` or `if` on a trained array: the copy would move with the policy.
        raise ValueError(
            "`reference_of` must be traceable by JAX in the arrays that are trained, and not "
            f"depend on their values, but it has read one: {str(error).splitlines()[0]} {remedy}"
        ) from error
    if paths:
        raise ValueError(
            "`reference_of` shows arrays that are trained, so the reference would move with the "
            f"policy: {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}. {remedy}"
        )


def _mix(old: Array, new: Array, alpha: Number) -> Array:
    if not eqx.is_inexact_array(old):
        return jnp.array(old, copy=True)
    # In bfloat16 a small `alpha` would round to no change at all.
    wide = at_least_float32(old.dtype)
    return cast(alpha * cast(new, wide) + (1 - alpha) * old.astype(wide), old.dtype)
