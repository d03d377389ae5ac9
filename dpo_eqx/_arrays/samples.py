"""Completions drawn from a policy, several for each prompt.

`models.sample` draws them; nothing here depends on models.
"""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float

from .tokens import Tokens


class Samples(eqx.Module):
    """Several completions for each prompt, with their log-probabilities.

    **Arguments:**

    - `tokens`: the new tokens alone. The mask is true up to and including the token that ended a
        completion. Shape `(prompts, samples, length)`.
    - `log_probs`: the log-probability of each completion under the policy that drew it, at
        temperature 1 and without any truncation, summed over the tokens of the mask, in nats.
        Shape `(prompts, samples)`.

    **Raises:**

    `ValueError` if the shapes do not fit each other.
    """

    tokens: Tokens
    log_probs: Float[Array | np.ndarray, "prompts samples"]

    def __check_init__(self):
        if self.tokens.ids.ndim != 3 or self.log_probs.shape != self.tokens.ids.shape[:2]:
            raise ValueError(
                "`tokens` must have shape `(prompts, samples, length)`, and `log_probs` "
                f"`(prompts, samples)`; got {self.tokens.ids.shape} and {self.log_probs.shape}."
            )
