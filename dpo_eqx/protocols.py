"""The contracts between the parts, as types: what a policy, a score, a loss and a step are.

Nothing here computes anything. Nothing has to inherit from these protocols: any function or module
of the right form satisfies them.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ._arrays.layout import AbstractLayout
from ._arrays.metrics import Metrics, MetricValues
from ._jax.keys import Keys

Policy = TypeVar("Policy", bound=PyTree)
OptState = TypeVar("OptState", bound=PyTree)
LogProbs = TypeVar("LogProbs", contravariant=True)
Scored = TypeVar("Scored", covariant=True)
PairValues = TypeVar("PairValues", covariant=True)


@runtime_checkable
class Loss(Protocol[LogProbs, PairValues]):
    """A loss: takes the log-probabilities of some pairs, and returns one value for each pair.

    `LogProbs` is `PairLogProbs` and `PairValues` is `PairLoss`, or `UnpairedLogProbs` and
    `UnpairedLoss` for single completions. All losses in `dpo_eqx.losses` have this form. Any
    function of your own with this form can replace them.
    """

    def __call__(
        self, policy: LogProbs, reference: LogProbs | None, /, *args: Any, **hyper_parameters: Any
    ) -> PairValues:
        """The unreduced losses and rewards, in the order of the pairs.

        `reference` is `None` if there is no reference. Hyper-parameters are keyword-only; those in
        `batch.per_pair` arrive as arrays of shape `(pairs,)`.
        """
        ...


@runtime_checkable
class Score(Protocol[Scored]):
    """A score: runs a policy on a batch, and returns the log-probability of each completion."""

    def __call__(self, policy: Any, batch: Any, /, *, key: Keys | None) -> Scored:
        """`PairLogProbs` or `UnpairedLogProbs`, in nats, summed over the scored tokens.

        `key` is `None` for a reference, and during evaluation.
        """
        ...


@runtime_checkable
class MetricsFunction(Protocol):
    """The metrics of each pair, before the step averages them; see `default_metrics`."""

    def __call__(self, policy: Any, reference: Any, loss: Any, /) -> Mapping[str, MetricValues]:
        """A dict from each metric's name to its values, of shape `(pairs,)`.

        A pair `(values, mask)` averages over the true positions of the mask only. The arguments
        are the log-probabilities of the policy and of the reference (or `None`), and the result
        of the loss.
        """
        ...


@runtime_checkable
class Gradient(Protocol):
    """What `make_grad` returns: the gradient of the weighted mean loss, and the metrics."""

    def __call__(
        self,
        policy: PyTree,
        batch: Any,
        reference: PyTree | None = None,
        *,
        key: Keys | None = None,
    ) -> tuple[PyTree, dict[str, Float[Array, ""]]]:
        """A pytree like `policy` with `None` for frozen leaves, and a dict of scalars."""
        ...


@runtime_checkable
class Step(Protocol):
    """What `make_step` returns: one update of the policy and of the optimiser's state."""

    def __call__(
        self,
        policy: Policy,
        opt_state: OptState,
        batch: Any,
        reference: PyTree | None = None,
        *,
        key: Keys | None = None,
    ) -> tuple[Policy, OptState, dict[str, Float[Array, ""]]]:
        """The new policy, the new optimiser state, and a dict of scalar metrics."""
        ...


@runtime_checkable
class Evaluate(Protocol):
    """What `make_eval` returns: the metrics of a policy on a batch, as sums that can be added."""

    def __call__(self, policy: PyTree, batch: Any, reference: PyTree | None = None) -> Metrics:
        """`Metrics`, whose `+` joins batches exactly and whose `mean()` is a dict of scalars."""
        ...


@runtime_checkable
class FastPolicy(Protocol):
    """Optional methods of a policy, in addition to `policy(ids)`, with which it runs faster.

    The result is the same. `score_pairs` then encodes each prompt once for both completions,
    applies the unembedding to completion positions only, and never builds the logits. The implied
    logits are `hidden @ unembedding.T + unembedding_bias`, soft-capped as
    `softcap * tanh(logits / softcap)`. They must equal the logits that `policy(ids)` returns.

    More attributes are optional: `unembedding_bias`, of shape `(vocab,)`, and `softcap`, a number;
    `None` has the same effect as a missing attribute. If `rounds_alike` is true, the step does not
    run the forward pass of a policy in half precision once more (`make_grad` says why it does).

    The shortest implementation attends through `layout.mask()` and takes positions from
    `layout.positions`. It then also runs on packed rows, whose `layout` is a `PackedLayout`:

    ```python
    class Policy(eqx.Module):
        ...
        def __call__(self, ids, *, key=None):
            layout = dpx.Layout(jnp.asarray(ids.size), ids.size, ())
            return self.hidden(ids, layout) @ self.unembedding.T

        def hidden(self, ids, layout, *, key=None):
            x = self.tokens[ids] + self.positions[layout.positions]
            return self.attend(x, mask=layout.mask())
    ```
    """

    @property
    def unembedding(self) -> Float[Array, "vocab width"]:
        """The output embedding of each token."""
        ...

    def hidden(
        self, ids: Int[Array, " length"], layout: AbstractLayout, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "length width"]:
        """The last hidden states, after the final normalisation, of a row with this `layout`."""
        ...


@runtime_checkable
class RecurrentPolicy(Protocol):
    """Optional methods of a policy, in addition to `policy(ids)`, that read a sequence in parts.

    The result is the same. `score_pairs` then reads each prompt once, and each completion from the
    state after its prompt. `models.sample` and `models.generate` read only the last token for each
    token that they draw. A policy that offers `FastPolicy`, too, is scored by its `hidden`.

    The logits are those of `FastPolicy`: hidden states times `unembedding`, with the same optional
    attributes. They must equal the logits that `policy(ids)` returns.

    The state is a pytree of arrays. To draw tokens with it, `extend` must keep its shapes and
    dtypes. The last state of a linear recurrence is enough:

    ```python
    class Policy(eqx.Module):
        ...
        def __call__(self, ids, *, key=None):
            return self.extend(jnp.zeros(self.decay.size), ids)[1] @ self.unembedding.T

        def start(self, ids, length, *, key=None):
            states, hidden = self.read(jnp.zeros(self.decay.size), ids)
            return states[length - 1], hidden[length - 1]

        def extend(self, state, ids, *, key=None):
            states, hidden = self.read(state, ids)
            return states[-1], hidden
    ```
    """

    @property
    def unembedding(self) -> Float[Array, "vocab width"]:
        """The output embedding of each token."""
        ...

    def start(
        self, ids: Int[Array, " length"], length: Int[Array, ""], *, key: PRNGKeyArray | None = None
    ) -> tuple[Any, Float[Array, " width"]]:
        """The state after the first `length` tokens, and the last hidden state of the last of them.

        The tokens behind them are padding, which must not change the result. `length` is at least
        1. It is called without `key` if there is no key.
        """
        ...

    def extend(
        self, state: Any, ids: Int[Array, " length"], *, key: PRNGKeyArray | None = None
    ) -> tuple[Any, Float[Array, "length width"]]:
        """The state after all of `ids`, which follow on `state`, and the last hidden state of each.

        One state is extended by several completions, so `state` must stay as it is.
        """
        ...
