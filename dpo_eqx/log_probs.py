"""Log-probabilities of tokens and of sequences, from logits, and the records that carry them.

Nothing here knows about policies or losses; `linear.py` has the version that never builds the
logits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from .scalars import Weights
from .tokens import as_ids


class PairLogProbs(eqx.Module):
    """Log-probabilities of the chosen and the rejected completion of each pair.

    In nats, **summed** over the scored tokens, never averaged; the number of scored tokens
    travels beside them for whoever wants the average.

    **Arguments:**

    - `chosen`, `rejected`: $\\log\\pi(y_w | x)$ and $\\log\\pi(y_l | x)$. Shape `(pairs,)`.
    - `chosen_length`, `rejected_length`: the number of scored tokens. Shape `(pairs,)`.
    - `weight`: the batch's weight of each pair, copied by the score. Shape `(pairs,)`.
    - `chosen_confidence`, `rejected_confidence`: for `losses.wpo`, where they were asked for.
        Shape `(pairs,)`.
    """

    chosen: Float[Array | np.ndarray, " pairs"]
    rejected: Float[Array | np.ndarray, " pairs"]
    chosen_length: Integer[Array | np.ndarray, " pairs"] | None = None
    rejected_length: Integer[Array | np.ndarray, " pairs"] | None = None
    weight: Weights | None = None
    chosen_confidence: Float[Array | np.ndarray, " pairs"] | None = None
    rejected_confidence: Float[Array | np.ndarray, " pairs"] | None = None

    def __check_init__(self):
        check_one_shape(self, "chosen")


class UnpairedLogProbs(eqx.Module):
    """Log-probabilities of single completions with a label, for KTO and its relatives.

    **Arguments:**

    - `completion`: $\\log\\pi(y | x)$, summed, nats. Shape `(pairs,)`.
    - `label`: true where the completion is desirable. Shape `(pairs,)`.
    - `kl`: $\\log\\pi(y' | x)$ of a completion $y'$ drawn for another prompt, from which KTO
        estimates its reference point. Shape `(pairs,)`.
    - `length`: the number of scored tokens of `completion`. Shape `(pairs,)`.
    - `weight`: the batch's weight of each row, copied by the score. Shape `(pairs,)`.
    """

    completion: Float[Array | np.ndarray, " pairs"]
    label: Bool[Array | np.ndarray, " pairs"]
    kl: Float[Array | np.ndarray, " pairs"] | None = None
    length: Integer[Array | np.ndarray, " pairs"] | None = None
    weight: Weights | None = None

    def __check_init__(self):
        check_one_shape(self, "completion")
        if hasattr(self.label, "dtype") and self.label.dtype != bool:
            raise ValueError(
                f"`label` must be boolean (true where the completion is desirable), got "
                f"{self.label.dtype}. Convert it, say with `label > 0`."
            )


def check_one_shape(record: eqx.Module, first: str) -> None:
    """Raises where the arrays of `record` do not all have the shape of its field `first`."""
    want = getattr(getattr(record, first), "shape", None)
    for name, value in vars(record).items():
        shape = getattr(value, "shape", want)
        if shape != want:
            raise ValueError(
                f"`{name}` must have the shape of `{first}`, {want}, one value per pair; "
                f"got {shape}."
            )


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


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """`dtype` where it is float32 or wider, else float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
