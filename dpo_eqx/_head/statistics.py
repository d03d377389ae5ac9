r"""Statistics of next-token distributions: entropy, whether the target is on top, the mean logit.

`linear.py` adds them up over tiles of logits, in the pass that computes the log-probabilities.
Metrics need them and losses do not, so no gradient flows through them.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._jax.dtypes import at_least_float32

# The log-probabilities themselves are no statistic: they are there anyway.
NAMES = ("log_probs", "entropy", "accuracy", "logits")

Sums = dict[str, Array]


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises `ValueError` if `metrics` is not a sequence of `NAMES`."""
    unknown = [name for name in metrics if name not in NAMES]
    if isinstance(metrics, str) or unknown:
        known = ", ".join(f'"{name}"' for name in NAMES)
        raise ValueError(f"`metrics` of a score must be some of {known}; got {metrics!r}.")


class TokenStatistics(eqx.Module):
    r"""Statistics of the distribution that predicts each token; `None` if not asked for.

    - `entropy`: $-\sum_v p_v \log p_v$, in nats.
    - `correct`: 1 if no token has a higher logit than the target, else 0.
    - `mean_logit`: the mean of the logits over the vocabulary.
    """

    entropy: Float[Array, "*batch length"] | None = None
    correct: Float[Array, "*batch length"] | None = None
    mean_logit: Float[Array, "*batch length"] | None = None


def statistics_of(
    logits: Float[Array, "*batch length vocab"],
    targets: Int[Array, "*batch length"],
    wanted: Sequence[str],
) -> TokenStatistics:
    """The statistics with the names `wanted`, from all logits at once."""
    logits = jax.lax.stop_gradient(logits).astype(at_least_float32(logits.dtype))
    entropy = correct = mean = None
    if "entropy" in wanted:
        log_probs = jax.nn.log_softmax(logits)
        probs = jnp.exp(log_probs)
        entropy = -jnp.where(probs > 0, probs * log_probs, 0).sum(axis=-1)
    if "accuracy" in wanted:
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
        correct = (picked >= logits.max(axis=-1)).astype(logits.dtype)
    if "logits" in wanted:
        mean = logits.mean(axis=-1)
    return TokenStatistics(entropy, correct, mean)


def start(zeros: Float[Array, "count chunk"], wanted: Sequence[str]) -> Sums:
    """The sums over no tile."""
    return {name: zeros for name in ("entropy", "logits") if name in wanted}


def add(
    sums: Sums,
    logits: Float[Array, "chunk part"],
    peak: Float[Array, " chunk"],
    total: Float[Array, " chunk"],
    offset: Float[Array, " chunk"],
    shrunk: Float[Array, " chunk"],
) -> Sums:
    r"""The sums with one more tile.

    The entropy is $\log Z - \sum_v e^{l_v - o}(l_v - o) / Z$, with the offset $o$ of an online
    softmax and $Z = \sum_v e^{l_v - o}$. The sum in it moves to a new offset as $Z$ does.

    **Arguments:**

    - `peak`, `total`: the largest logit and $Z$ of the tiles before this one.
    - `offset`, `shrunk`: what `raised` returned for this tile.
    """
    added = {}
    if "entropy" in sums:
        before = jnp.where(jnp.isfinite(peak), peak, 0)
        below = logits - offset[:, None]
        shares = jnp.exp(below)
        # A logit of -inf has the share 0, and adds 0.
        own = jnp.where(shares > 0, shares * below, 0).sum(axis=-1)
        added["entropy"] = shrunk * (sums["entropy"] + (before - offset) * total) + own
    if "logits" in sums:
        finite = jnp.where(jnp.isfinite(logits), logits, 0)
        added["logits"] = sums["logits"] + finite.sum(axis=-1)
    return added


def finished(
    sums: Sums,
    wanted: Sequence[str],
    peak: Float[Array, "count chunk"],
    total: Float[Array, "count chunk"],
    picked: Float[Array, "count chunk"],
    vocab: int,
) -> TokenStatistics:
    """The statistics from the sums over all tiles; `picked` is the logit of the target."""
    entropy = jnp.log(total) - sums["entropy"] / total if "entropy" in wanted else None
    correct = (picked >= peak).astype(total.dtype) if "accuracy" in wanted else None
    mean = sums["logits"] / vocab if "logits" in wanted else None
    return TokenStatistics(entropy, correct, mean)
