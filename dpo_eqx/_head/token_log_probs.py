"""Log-probabilities of targets from logits, and their sums over a mask.

Here all logits exist; `linear.py` works without them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from .._arrays.tokens import as_ids
from .._jax.dtypes import at_least_float32


def token_log_probs(
    logits: Float[Array | np.ndarray, "*batch length vocab"],
    targets: Integer[Array | np.ndarray, "*batch length"],
) -> Float[Array, "*batch length"]:
    r"""The log-probability of each target under its row of logits, in nats.

    $\log p_t = \text{logits}_{t, y_t} - \log\sum_v e^{\text{logits}_{t, v}}$, in float32 or wider
    whatever the logits' dtype: in bfloat16 the spacing of numbers near -700 is 4 nats.

    **Arguments:**

    - `logits`: `logits[..., t, :]` is the distribution of `targets[..., t]`: the caller has
        aligned the two. Shape `(*batch, length, vocab)`.
    - `targets`: token ids. Shape `(*batch, length)`.

    **Returns:**

    Shape `(*batch, length)`. NaN where the target is not in `[0, vocab)`, or where a row of logits
    has no finite maximum (all `-inf`, say); the gradient with respect to such a row is zero, so
    that `sequence_log_probs` can mask it out.
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(at_least_float32(logits.dtype))
    # The maximum of a row of -inf is -inf, and its softmax NaN even under a cotangent of zero:
    # the row itself is replaced, not only its result.
    well_formed = jnp.isfinite(jax.lax.stop_gradient(logits).max(axis=-1))
    log_probs = jax.nn.log_softmax(jnp.where(well_formed[..., None], logits, 0))
    known, index = known_targets(as_ids(targets), logits.shape[-1])
    picked = jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]
    return jnp.where(well_formed & known, picked, jnp.nan)


def known_targets(
    targets: Int[Array, "*batch length"], vocab: int
) -> tuple[Bool[Array, "*batch length"], Int[Array, "*batch length"]]:
    """Which targets are in `[0, vocab)`, and the targets with the others replaced by 0."""
    known = (targets >= 0) & (targets < vocab)
    return known, jnp.where(known, targets, 0)


def sequence_log_probs(
    token_log_probs: Float[Array | np.ndarray, "*batch length"],
    mask: Bool[Array | np.ndarray, "*batch length"],
) -> Float[Array, "*batch"]:
    """The sum of the log-probabilities of the tokens where `mask` is true.

    A masked position contributes nothing, a NaN or an infinity included, to the value or to the
    gradient. A row without a true position sums to 0.

    **Arguments:**

    - `token_log_probs`: in nats, at least float32. Shape `(*batch, length)`.
    - `mask`: true at the scored tokens. Shape `(*batch, length)`.
    """
    return jnp.where(mask, token_log_probs, 0).sum(axis=-1)
