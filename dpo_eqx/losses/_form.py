"""What every loss reads: hyper-parameters, log-ratios, lengths, averages, and a reference.

The losses themselves are in the other files of this folder, one function for each algorithm.
"""

from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._arrays.log_probs import PairLogProbs, UnpairedLogProbs
from .._jax.describe import described
from .._jax.scalars import Number, PerPair
from ._numerics import difference, wide

# A hyper-parameter: a number, a traced scalar, or one value per pair.
if TYPE_CHECKING:
    # At run time a NumPy array is accepted too, see `_jax/scalars.py`.
    Scalar = float | Array
else:
    Scalar = Number | PerPair


Reference = TypeVar("Reference")

# The two kinds of log-probabilities, what they are of, and the scores that make them.
_FORMS = (
    ("PairLogProbs", "pairs", "score_pairs"),
    ("UnpairedLogProbs", "single completions", "score_unpaired"),
)


def log_ratios(
    policy: PairLogProbs, reference: PairLogProbs | None, *, needed_by: str
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    r"""The log-ratios $\rho_w$ and $\rho_l$, $\rho = \log\pi - \log\pi_{ref}$, of both completions.

    No gradient flows into `reference`. If it is missing, a `ValueError` says how to give one.
    """
    reference = require_reference(reference, needed_by=needed_by)
    _check_form("chosen", policy, reference, needed_by=needed_by)
    chosen = _difference(policy.chosen, reference.chosen)
    return chosen, _difference(policy.rejected, reference.rejected)


def log_ratio(
    policy: UnpairedLogProbs, reference: UnpairedLogProbs | None, *, needed_by: str
) -> Float[Array, " pairs"]:
    r"""The log-ratio $\rho$ of single completions, as `log_ratios`."""
    reference = require_reference(reference, needed_by=needed_by)
    _check_form("completion", policy, reference, needed_by=needed_by)
    return _difference(policy.completion, reference.completion)


def _difference(
    policy: Float[Array | np.ndarray, " pairs"], reference: Float[Array | np.ndarray, " pairs"]
) -> Float[Array, " pairs"]:
    if np.shape(policy) != np.shape(reference):
        raise ValueError(
            f"`policy` and `reference` must hold the log-probabilities of the same pairs; got "
            f"arrays of shape {np.shape(policy)} and {np.shape(reference)}. Score the same batch "
            "by both."
        )
    return difference(wide(policy), jax.lax.stop_gradient(wide(reference)))


def _check_form(field: str, *log_probs: object, needed_by: str) -> None:
    """Raises if a loss of pairs gets single completions, or the other way round.

    `field` is what the right log-probabilities have.
    """
    for given in log_probs:
        if not hasattr(given, field):
            (kind, rows, score), (_, others, _) = _FORMS if field == "chosen" else reversed(_FORMS)
            raise ValueError(
                f"`{needed_by}` takes the log-probabilities of {rows}, `dpx.{kind}`; got "
                f"{described(given)}. Give a batch of {rows}, and `score=dpx.{score}` to the step, "
                f"or take a loss of {others}."
            )


def require_reference(reference: Reference | None, *, needed_by: str) -> Reference:
    """`reference`, or a `ValueError` that lists the ways to give one."""
    if reference is None:
        raise ValueError(
            f"`{needed_by}` needs a reference and got none. Give one of: a policy as the argument "
            "`reference` of the step; precomputed log-probabilities as `batch.reference`, from "
            "`precompute_reference`; a view of the policy by `reference_of=`, such as "
            "`models.without_lora`. To train without one, use `losses.reference_free(loss)`."
        )
    return reference


def lengths(
    policy: PairLogProbs, *, needed_by: str
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    """The numbers of scored tokens, in the dtype of the losses.

    If they are missing, a `ValueError` says how to get them.
    """
    _check_form("chosen", policy, needed_by=needed_by)
    for name in ("chosen_length", "rejected_length"):
        if getattr(policy, name) is None:
            raise ValueError(
                f"`{needed_by}` needs `policy.{name}`, the number of scored tokens, and got none. "
                "`score_pairs` fills it in; to make log-probabilities by hand, pass "
                f"`PairLogProbs(..., {name}=...)`."
            )
    dtype = wide(policy.chosen).dtype
    chosen, rejected = jnp.asarray(policy.chosen_length), jnp.asarray(policy.rejected_length)
    return chosen.astype(dtype), rejected.astype(dtype)


def averages(
    policy: PairLogProbs, *, needed_by: str
) -> tuple[Float[Array, " pairs"], Float[Array, " pairs"]]:
    """Log-probabilities per scored token. The average of an empty completion is 0."""
    chosen, rejected = lengths(policy, needed_by=needed_by)
    return (
        wide(policy.chosen) / jnp.maximum(chosen, 1),
        wide(policy.rejected) / jnp.maximum(rejected, 1),
    )


def average_of(policy: UnpairedLogProbs, *, needed_by: str) -> Float[Array, " pairs"]:
    """The log-probability of single completions per scored token, as `averages`."""
    _check_form("completion", policy, needed_by=needed_by)
    if policy.length is None:
        raise ValueError(
            f"`{needed_by}` needs `policy.length`, the number of scored tokens, and got none. "
            "`score_unpaired` fills it in; to make log-probabilities by hand, pass "
            "`UnpairedLogProbs(..., length=...)`."
        )
    total = wide(policy.completion)
    return total / jnp.maximum(jnp.asarray(policy.length).astype(total.dtype), 1)
