"""A policy between two policies: the geometric mixture of their next tokens.

It draws competitors of a policy, as in Nash-MD; it is not trained.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..._jax.dtypes import at_least_float32
from ..._jax.scalars import Number
from ..._scoring.policy_checks import checked_logits


class Mixture(eqx.Module):
    r"""The policy $\pi^{1-\alpha}\pi_{ref}^{\alpha}$, normalised for each next token.

    ```python
    rivals = models.sample(models.Mixture(policy, reference, 0.125), prompt, ...)
    ```

    It is a callable without a cache, so drawing runs both policies on the whole row for each token.

    **Arguments:**

    - `policy`, `reference`: causal callables from ids of shape `(length,)` to logits of shape
        `(length, vocab)`, with one vocabulary.
    - `alpha`: $\alpha$, the exponent of the reference, in `[0, 1]`; 0 is the policy alone.

    **Raises:**

    `ValueError` if `alpha` is a Python number out of range, or, when it is called, if the
    vocabularies differ.

    ??? cite

        Munos et al., *Nash Learning from Human Feedback*, 2023 (arXiv 2312.00886). TRL's
        `mixture_coef` is `alpha`.
    """

    policy: PyTree
    reference: PyTree
    alpha: Number

    def __check_init__(self):
        if not isinstance(self.alpha, jax.Array) and not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must be in [0, 1]; got {self.alpha}.")

    def __call__(self, ids: Int[Array, " length"]) -> Float[Array, "length vocab"]:
        ours, reference = (
            checked_logits(policy, policy(ids), ids) for policy in (self.policy, self.reference)
        )
        if ours.shape != reference.shape:
            raise ValueError(
                "`policy` and `reference` must have one vocabulary; got logits of shapes "
                f"{ours.shape} and {reference.shape}."
            )
        dtype = at_least_float32(jnp.result_type(ours, reference))
        alpha = jnp.asarray(self.alpha, dtype)
        # Logits are log-probabilities up to a constant, so their mixture needs no softmax.
        return (1 - alpha) * ours.astype(dtype) + alpha * reference.astype(dtype)
