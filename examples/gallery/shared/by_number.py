"""Batches that name sentences by number, so that a step scores each sentence only once.

The cost of a step then hardly grows with the number of pairs. The language and its policies are in
`sentences`; `Language.pairs` makes batches of tokens.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

import dpo_eqx as dpx

from .sentences import Language, Numbers


class Pairs(eqx.Module):
    """Pairs of sentences, for `score_pairs`."""

    chosen: Numbers
    rejected: Numbers
    weight: Float[Array, " pairs"] | None = None
    reference: dpx.PairLogProbs | None = None
    per_pair: dict[str, Float[Array, " pairs"]] | None = None

    @property
    def pairs(self) -> int:
        """The number of pairs."""
        return len(self.chosen)


class Thumbs(eqx.Module):
    """Sentences with a label each, for `score_thumbs`. `kl` are the mismatched ones of KTO."""

    completion: Numbers
    label: Bool[Array, " pairs"]
    kl: Numbers | None = None
    weight: Float[Array, " pairs"] | None = None
    reference: dpx.UnpairedLogProbs | None = None
    per_pair: dict[str, Float[Array, " pairs"]] | None = None

    @property
    def pairs(self) -> int:
        """The number of labels."""
        return len(self.completion)


def score_pairs(language: Language) -> dpx.Score[dpx.PairLogProbs]:
    """A score with the values of `dpx.score_pairs`."""
    lengths = jnp.asarray(language.tokens.mask.sum(axis=1))

    def score(policy: PyTree, batch: Pairs, *, key=None) -> dpx.PairLogProbs:
        log_probs, numbers = language.log_probs(policy), (batch.chosen, batch.rejected)
        return dpx.PairLogProbs(
            *(log_probs[n] for n in numbers), *(lengths[n] for n in numbers), weight=batch.weight
        )

    return score


def score_thumbs(language: Language) -> dpx.Score[dpx.UnpairedLogProbs]:
    """A score with the values of `dpx.score_unpaired`."""
    lengths = jnp.asarray(language.tokens.mask.sum(axis=1))

    def score(policy: PyTree, batch: Thumbs, *, key=None) -> dpx.UnpairedLogProbs:
        log_probs, at = language.log_probs(policy), batch.completion
        kl = None if batch.kl is None else jax.lax.stop_gradient(log_probs[batch.kl])
        return dpx.UnpairedLogProbs(log_probs[at], batch.label, kl, lengths[at], batch.weight)

    return score
