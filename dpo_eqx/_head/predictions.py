"""Predictions of completion tokens: logits, or hidden states from which tiles of logits are made.

Running a policy gives one of the two; both have the same interface.
"""

import abc
import math

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from .._jax.by_platform import CUDA
from .._jax.partitioning import ROWS, over_axes, row_shards
from .collisions import collisions_of, linear_collisions
from .kl import linear_kl, token_kl
from .linear import with_statistics
from .statistics import TokenStatistics, statistics_of
from .tiles import Unembedding
from .tiling import tiling_for
from .token_log_probs import token_log_probs


class AbstractPrediction(eqx.Module):
    """The next-token distributions at some positions of each pair."""

    @abc.abstractmethod
    def log_probs(
        self, targets: Int[Array, "pairs length"], wanted: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "pairs length"], TokenStatistics]:
        """The log-probability of each target, in nats, and the statistics `wanted`, by name."""

    @abc.abstractmethod
    def collisions(self) -> Float[Array, "pairs length"]:
        r"""$\log\sum_v p_v^2$ of each prediction; no gradient flows through it."""

    @abc.abstractmethod
    def all_logits(self) -> Float[Array, "pairs length vocab"]:
        """All logits at once."""


class Logits(AbstractPrediction):
    """Predictions as logits."""

    logits: Float[Array, "pairs length vocab"]

    def log_probs(
        self, targets: Int[Array, "pairs length"], wanted: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "pairs length"], TokenStatistics]:
        statistics = statistics_of(self.logits, targets, wanted)
        return token_log_probs(self.logits, targets), statistics

    def collisions(self) -> Float[Array, "pairs length"]:
        return collisions_of(jax.lax.stop_gradient(self.logits))

    def all_logits(self) -> Float[Array, "pairs length vocab"]:
        return self.logits


class Hidden(AbstractPrediction):
    """Predictions as last hidden states and the unembedding; never holds all logits at once."""

    hidden: Float[Array, "pairs length width"]
    head: Unembedding
    chunk_size: int | None = eqx.field(static=True)

    def log_probs(
        self, targets: Int[Array, "pairs length"], wanted: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "pairs length"], TokenStatistics]:
        def log_probs_of_rows(rows: tuple[Array, Array], head: Unembedding):
            hidden, targets = rows
            return with_statistics(hidden, head, targets, wanted, self.chunk_size)

        # On a mesh, the gradient of the unembedding is then summed once, not once for each chunk.
        axes = ROWS if self._gathers_head() else "data"
        return over_axes(axes, log_probs_of_rows, (self.hidden, targets), self.head)

    def _gathers_head(self) -> bool:
        """Whether each device over `fsdp`, too, takes its own rows, and gathers the unembedding.

        Otherwise the hidden states of all devices are gathered, once for each part of the
        vocabulary. What moves fewer bytes is chosen; both have the same width.
        """
        if not row_shards(self.hidden, ROWS):
            return False
        shape, vocab = self.hidden.shape[:-1], self.head.weight.shape[0]
        # The tiles of accelerators, since the program is chosen before its platform is known.
        parts = tiling_for(shape, self.chunk_size, vocab)(CUDA).parts
        return parts * math.prod(shape) >= vocab * row_shards(self.hidden, ("data",))

    def collisions(self) -> Float[Array, "pairs length"]:
        return linear_collisions(
            self.hidden,
            self.head.weight,
            bias=self.head.bias,
            softcap=self.head.softcap,
            chunk_size=self.chunk_size,
        )

    def all_logits(self) -> Float[Array, "pairs length vocab"]:
        rows = self.hidden.reshape(-1, self.hidden.shape[-1])
        return self.head.logits(rows).reshape(*self.hidden.shape[:-1], -1)


def kl_between(
    policy: AbstractPrediction, reference: AbstractPrediction
) -> Float[Array, "pairs length"]:
    """The KL divergence of the policy's predictions from the reference's, in nats, per position.

    If both are hidden states, the logits are never all held at once.
    """
    if isinstance(policy, Hidden) and isinstance(reference, Hidden):
        return linear_kl(
            policy.hidden,
            policy.head.weight,
            reference.hidden,
            reference.head.weight,
            bias=policy.head.bias,
            softcap=policy.head.softcap,
            reference_bias=reference.head.bias,
            reference_softcap=reference.head.softcap,
            chunk_size=policy.chunk_size,
        )
    logits, reference_logits = policy.all_logits(), reference.all_logits()
    if logits.shape != reference_logits.shape:
        raise ValueError(
            "`policy` and `reference` must have one vocabulary; got logits of "
            f"{logits.shape[-1]} and {reference_logits.shape[-1]} tokens. Compare models that "
            "share a tokenizer."
        )
    return token_kl(logits, reference_logits)
