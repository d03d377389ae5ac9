"""Metrics of single tokens, as means for each pair with the number of tokens as weight.

The score computes the values of the tokens; `metrics.py` has the metrics of whole completions.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._arrays.log_probs import PairLogProbs, TokenValues, UnpairedLogProbs
from .._arrays.metrics import MetricValues

_FIELDS = ("entropy", "correct", "mean_logit")


def of_tokens(policy: PairLogProbs) -> dict[str, MetricValues]:
    """The metrics of pairs that the score was asked for."""
    if policy.chosen_tokens is None or policy.rejected_tokens is None:
        return {}
    chosen, rejected = _sums(policy.chosen_tokens), _sums(policy.rejected_tokens)
    both = {name: chosen[name] + rejected[name] for name in chosen}
    return {
        **_mean("entropy", both, "entropy"),
        **_mean("mean_token_accuracy", chosen, "correct"),
        **_mean("logits/chosen", chosen, "mean_logit"),
        **_mean("logits/rejected", rejected, "mean_logit"),
    }


def of_single_tokens(policy: UnpairedLogProbs) -> dict[str, MetricValues]:
    """The metrics of single completions that the score was asked for."""
    if policy.tokens is None:
        return {}
    sums, label = _sums(policy.tokens), jnp.asarray(policy.label)
    count = jnp.maximum(sums["count"], 1)
    means = {name: value / count for name, value in sums.items()}
    values: dict[str, Any] = {}
    if "entropy" in means:
        values["entropy"] = means["entropy"]
    if "correct" in means:
        values["mean_token_accuracy"] = means["correct"], label
    if "mean_logit" in means:
        values["logits/chosen"] = means["mean_logit"], label
        values["logits/rejected"] = means["mean_logit"], ~label
    return values


def _sums(tokens: TokenValues) -> dict[str, Float[Array, " pairs"]]:
    """The number of scored tokens of each completion as `count`, and the sums over them."""
    mask = jnp.asarray(tokens.mask)
    found = {name: getattr(tokens, name) for name in _FIELDS}
    dtype = tokens.log_probs.dtype
    sums = {
        name: jnp.where(mask, value, 0).sum(axis=1)
        for name, value in found.items()
        if value is not None
    }
    return {"count": mask.sum(axis=1, dtype=jnp.int32).astype(dtype), **sums}


def _mean(
    name: str, sums: dict[str, Float[Array, " pairs"]], field: str
) -> dict[str, MetricValues]:
    """The mean over the tokens of each pair, weighted by their number; nothing without `field`."""
    if field not in sums:
        return {}
    return {name: (sums[field] / jnp.maximum(sums["count"], 1), sums["count"])}
