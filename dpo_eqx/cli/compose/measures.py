"""What `dpo-eqx evaluate` measures on a batch: its sums, and the numbers of each pair.

The library's `_diagnosis/` defines the quantities that need a reference.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from ... import losses
from ..._arrays.batches import PreferenceBatch
from ..._arrays.log_probs import PairLogProbs
from ..._arrays.metrics import Metrics, wins
from ..._diagnosis.compare import compare
from ..._diagnosis.diagnose import diagnose
from ..._diagnosis.preferences import Preferences, count_preferences
from ..._jax.dtypes import in_dtype
from ..._jax.inference_mode import in_inference
from ..._scoring.score import score_pairs
from ..._training.metrics import weighted_sums
from ..settings.options import dtype_of


def make_measure(
    beta: float | None, compute_dtype: str | None
) -> Callable[[PyTree, PyTree, PreferenceBatch], tuple[Preferences, dict[str, Any]]]:
    """A jitted function of policy, reference and batch.

    It returns the sums over the batch, and the numbers of each pair by name.
    """
    loss = losses.dpo if beta is None else functools.partial(losses.dpo, beta=beta)
    dtype = dtype_of(compute_dtype)

    @eqx.filter_jit
    def measure(policy: PyTree, reference: PyTree, batch: PreferenceBatch):
        policy, reference = (in_dtype(in_inference(model), dtype) for model in (policy, reference))
        sides = compare(policy, reference, batch)
        pairs = diagnose(loss, sides.policy, sides.reference, per_pair=batch.per_pair)
        kl = sides.chosen_kl, sides.rejected_kl
        numbers = {
            "margin": pairs.margin,
            "gradient_weight": pairs.chosen_gradient_weight,
            "weight": sides.policy.weight,
        }
        for i, side in enumerate(("chosen", "rejected")):
            numbers |= {
                f"{side}_logp": getattr(sides.policy, side),
                f"{side}_reference_logp": getattr(sides.reference, side),
                f"{side}_log_ratio": getattr(pairs, f"{side}_log_ratio"),
                f"{side}_kl": kl[i],
                f"{side}_tokens": getattr(sides.policy, f"{side}_length"),
            }
        return count_preferences(sides.policy, pairs.margin, kl), numbers

    return measure


def make_lone_measure(
    compute_dtype: str | None,
) -> Callable[[PyTree, PreferenceBatch], tuple[Metrics, dict[str, Any]]]:
    """A jitted function of policy and batch, for what needs no reference; see `make_measure`."""
    dtype = dtype_of(compute_dtype)

    @eqx.filter_jit
    def measure(policy: PyTree, batch: PreferenceBatch):
        scores = score_pairs(in_dtype(in_inference(policy), dtype), batch)
        numbers = {
            "chosen_logp": scores.chosen,
            "rejected_logp": scores.rejected,
            "chosen_tokens": scores.chosen_length,
            "rejected_tokens": scores.rejected_length,
            "weight": scores.weight,
        }
        return _sums(scores), numbers

    return measure


def _sums(scores: PairLogProbs) -> Metrics:
    """Sums over a batch of how the policy ranks its pairs; a tie counts one half."""
    sides = jnp.stack([jnp.asarray(scores.chosen), jnp.asarray(scores.rejected)])
    lengths = jnp.stack([jnp.asarray(scores.chosen_length), jnp.asarray(scores.rejected_length)])
    averages = sides / jnp.maximum(lengths, 1).astype(sides.dtype)
    values = {
        "preference_accuracy": wins(sides[0] - sides[1]),
        "preference_accuracy_per_token": wins(averages[0] - averages[1]),
        "chosen_logp": sides[0],
        "rejected_logp": sides[1],
    }
    return weighted_sums(values, jnp.asarray(scores.weight))
