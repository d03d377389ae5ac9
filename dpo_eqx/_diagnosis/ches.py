"""How alike the hidden states of the two completions of a pair are.

Log-probabilities and losses are not here; `compare.py` and `diagnose.py` have them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._arrays.batches import PreferenceBatch
from .._arrays.tokens import Tokens
from .._head.predictions import Hidden
from .._jax.dtypes import at_least_float32
from .._jax.explicit_meshes import automatic
from .._scoring.predict import predict


def ches(
    policy: PyTree, batch: PreferenceBatch, *, length_normalized: bool = False
) -> Float[Array, " pairs"]:
    r"""The centred hidden embedding similarity of each pair, which predicts displacement.

    $\langle h_w, h_l \rangle - \|h_w\|^2$ with the sums $h_w$ and $h_l$ of the last hidden states
    that predict the scored tokens of the chosen and of the rejected completion. The pairs with the
    highest values are the ones that most often lower the likelihood of their own chosen
    completions, under DPO and its relatives. Give them a weight of 0, or look at them:

    ```python
    worst = dpx.ches(policy, batch).argsort()[::-1]
    ```

    Compare values of one policy only: they have the scale of its hidden states.

    **Arguments:**

    - `policy`: a policy that offers `FastPolicy` or `RecurrentPolicy`, such as every decoder of
        `dpo_eqx.models`; usually the reference.
    - `batch`: the pairs. Its weights have no influence.
    - `length_normalized`: whether to use means over the tokens in place of the sums. An empty
        completion has mean 0.

    **Returns:**

    A value for each pair, in squared units of the hidden states. Shape `(pairs,)`.

    **Raises:**

    `ValueError` if the policy offers no hidden states.

    ??? cite

        Razin et al., *Unintentional Unalignment: Likelihood Displacement in Direct Preference
        Optimization*, 2024, definition 2 (arXiv 2410.08847). With means: `length_normalize` of the
        authors' code.
    """
    chosen, rejected = automatic(_sums, like=1)(policy, batch)
    if length_normalized:
        chosen, rejected = _mean(chosen, batch.chosen), _mean(rejected, batch.rejected)
    return jnp.sum(chosen * rejected, axis=1) - jnp.sum(chosen * chosen, axis=1)


def _sums(
    policy: PyTree, batch: PreferenceBatch
) -> tuple[Float[Array, "pairs width"], Float[Array, "pairs width"]]:
    """The sums of the hidden states that predict the scored tokens of each completion."""
    completions = batch.chosen, batch.rejected
    predictions = predict(policy, batch.prompt, completions, keys=None, chunk_size=None)
    if not isinstance(predictions, Hidden):
        raise ValueError(
            "`policy` must offer hidden states, as a `FastPolicy` or a `RecurrentPolicy`; got a "
            f"{type(policy).__name__}, which returns only logits. See docs/policies.md."
        )
    hidden = predictions.hidden.astype(at_least_float32(predictions.hidden.dtype))
    # The completions lie one after the other, as `predict` concatenates them.
    halves = jnp.split(hidden, [batch.chosen.ids.shape[1]], axis=1)
    chosen, rejected = (
        jnp.where(jnp.asarray(tokens.mask)[:, :, None], half, 0).sum(axis=1)
        for tokens, half in zip(completions, halves, strict=True)
    )
    return chosen, rejected


def _mean(total: Float[Array, "pairs width"], tokens: Tokens) -> Float[Array, "pairs width"]:
    """A sum over the scored tokens, divided by their number, or 0 if there are none."""
    count = jnp.asarray(tokens.mask).sum(axis=1, keepdims=True, dtype=jnp.int32)
    return total / jnp.maximum(count, 1).astype(total.dtype)
