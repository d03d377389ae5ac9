"""Log-probabilities of targets from logits, and their sums over a mask.

The functions here need all logits; `linear.py` works without them.
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

    - `logits`: `logits[..., t, :]` predicts `targets[..., t]`: the caller must align the two.
        Shape `(*batch, length, vocab)`.
    - `targets`: token ids. Shape `(*batch, length)`.

    **Returns:**

    Shape `(*batch, length)`. A value is NaN if its target is not in `[0, vocab)`, or if its row of
    logits has no finite maximum (for example, if all are `-inf`). The gradient with respect to such
    a row is zero, so that `sequence_log_probs` can mask it out.
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(at_least_float32(logits.dtype))
    # The gradient of the softmax of a row of -inf is NaN, even for a cotangent of zero. So the row
    # itself is replaced, not only its result.
    well_formed = jnp.isfinite(jax.lax.stop_gradient(logits).max(axis=-1))
    log_probs = jax.nn.log_softmax(jnp.where(well_formed[..., None], logits, 0))
    known, index = known_targets(as_ids(targets), logits.shape[-1])
    picked = jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]
    return jnp.where(well_formed & known, picked, jnp.nan)


def known_targets(
    targets: Int[Array, "*batch length"], vocab: int
) -> tuple[Bool[Array, "*batch length"], Int[Array, "*batch length"]]:
    """Whether each target is in `[0, vocab)`, and the targets with all others replaced by 0."""
    known = (targets >= 0) & (targets < vocab)
    return known, jnp.where(known, targets, 0)


def sequence_log_probs(
    token_log_probs: Float[Array | np.ndarray, "*batch length"],
    mask: Bool[Array | np.ndarray, "*batch length"],
) -> Float[Array, "*batch"]:
    """The sum of the log-probabilities of the tokens at which `mask` is true.

    All other positions contribute nothing to the value or the gradient, even if they are NaN or
    infinite. A row without a true position sums to 0.

    **Arguments:**

    - `token_log_probs`: in nats, at least float32. Shape `(*batch, length)`.
    - `mask`: true at the scored tokens. Shape `(*batch, length)`.
    """
    return jnp.where(mask, token_log_probs, 0).sum(axis=-1)
