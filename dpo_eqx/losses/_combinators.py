"""Losses made of losses: a weighted sum, averages over tokens, no reference, WPO's weights.

Each combinator takes and returns losses of the common form, including losses of a user.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._arrays.log_probs import PairLogProbs, UnpairedLogProbs
from .._arrays.loss_values import PairLoss, UnpairedLoss
from ._divergences import reverse_kl
from ._form import Scalar, lengths, log_ratios, require_reference
from ._marks import Marks, marked, marks_of, parts, takes
from ._numerics import times, wide

LogProbs = TypeVar("LogProbs", PairLogProbs, UnpairedLogProbs)
Result = TypeVar("Result", PairLoss, UnpairedLoss)


def combine(*terms: tuple[Scalar, Callable[..., Result]]) -> Callable[..., Result]:
    r"""A weighted sum of losses, with the rewards of the first.

    For example, `combine((1, dpo), (alpha, sft))` is Iterative Reasoning Preference Optimisation
    (TRL's `rpo_alpha`), and a third term `bco_pair` makes it Mixed Preference Optimisation (MPO).
    Bind hyper-parameters beforehand with `partial`. A keyword given to the result goes to every
    term that takes it and has not bound it.

    **Arguments:**

    - `terms`: tuples of a weight and a loss. A weight is a number or a scalar.

    **Returns:**

    A loss.

    **Raises:**

    `ValueError` if a term is not such a tuple, or if no term takes a keyword.
    """
    for term in terms or (None,):
        if not isinstance(term, tuple) or len(term) != 2 or not callable(term[1]):
            raise ValueError(
                f"`combine` takes pairs of a weight and a loss, at least one; got {term!r}. Write "
                "`combine((1, dpo), (0.5, sft))`."
            )
    losses = [loss for _, loss in terms]

    def combined(policy: LogProbs, reference: LogProbs | None, **keywords) -> Result:
        results = [
            loss(policy, reference, **arguments)
            for loss, arguments in zip(losses, _routed(losses, keywords), strict=True)
        ]
        total = sum(times(weight, r.loss) for (weight, _), r in zip(terms, results, strict=True))
        return replace(results[0], loss=total)

    return marked(combined, Marks(inner=tuple(losses)))


def length_normalized(loss: Callable[..., PairLoss]) -> Callable[..., PairLoss]:
    r"""`loss` on scores averaged over tokens: $s(\rho)/\max(n, 1)$ in place of $s(\rho)$.

    The division comes after the divergence, as in TRL. Rewards stay summed.

    **Arguments:**

    - `loss`: a loss with a keyword `divergence`: `dpo` (the result is the loss of Tulu 3),
        `robust_dpo`, `hinge`, `ipo` (the result is TRL's `"ipo"`), `exo`, `discopop`, or a loss of
        a user. A divergence that `partial` has bound is used.

    **Returns:**

    A loss of the same form.

    **Raises:**

    `ValueError` if `loss` takes no `divergence`. The result raises `ValueError` if the lengths or
    the reference are missing.

    ??? cite

        Lambert et al., *Tulu 3: Pushing Frontiers in Open Language Model Post-Training*, 2024
        (arXiv 2411.15124).
    """
    parameter = inspect.signature(loss).parameters.get("divergence")
    if parameter is None:
        raise ValueError(
            f"`length_normalized` takes a loss of the difference of scores, with a keyword "
            f"`divergence` (`dpo`, `robust_dpo`, `hinge`, `ipo`, `exo`, `discopop`); got "
            f"`{_name(loss)}`. To normalise a sum of losses, normalise each term of `combine`."
        )
    bound = reverse_kl if parameter.default is parameter.empty else parameter.default
    free = any(marks_of(part).reference_free for part, _ in parts(loss))

    @functools.wraps(loss)
    def normalized(policy: PairLogProbs, reference: PairLogProbs | None, **keywords) -> PairLoss:
        name = f"length_normalized({_name(loss)})"
        if free:
            reference = _uniform(policy)
        reference = require_reference(reference, needed_by=name)
        score = keywords.get("divergence", bound)
        tokens = (jnp.maximum(n, 1) for n in lengths(policy, needed_by=name))
        rhos = log_ratios(policy, reference, needed_by=name)
        chosen, rejected = (score(rho) / n for rho, n in zip(rhos, tokens, strict=True))
        averaged = replace(policy, chosen=chosen, rejected=rejected)
        plain = loss(policy, reference, **keywords)
        # The scores stand for log-probabilities against a reference of 0, so that `loss` itself
        # does not need the lengths. `reverse_kl` leaves the scores unchanged.
        inner = loss(averaged, _uniform(reference), **{**keywords, "divergence": reverse_kl})
        return replace(plain, loss=inner.loss)

    return marked(normalized, Marks(inner=(loss,)))


def reference_free(loss: Callable[..., Result]) -> Callable[..., Result]:
    r"""`loss` against a reference of log-probability 0, so that its rewards are $\beta\log\pi$.

    **Arguments:**

    - `loss`: any loss, on pairs or on single completions.

    **Returns:**

    A loss of the same form that ignores its reference.
    """

    @functools.wraps(loss)
    def free(policy: LogProbs, reference: LogProbs | None, **keywords) -> Result:
        return loss(policy, _uniform(policy), **keywords)

    return marked(free, Marks(reference_free=True, inner=(loss,)))


def wpo(loss: Callable[..., PairLoss]) -> Callable[..., PairLoss]:
    r"""Weighted Preference Optimisation: more weight for pairs that the policy is likely to write.

    Multiplies the loss of a pair by the confidences of both completions,
    $\exp(\mathrm{mean}_t[\log p_t(y_t) - \log\sum_j p_t(j)^2])$ for the policy's distribution $p_t$
    at token $t$ of the completion $y$ and all tokens $j$ of the vocabulary. No gradient flows
    through the confidences. As in TRL they are not clamped at 1, and they do not enter the
    denominator of the mean.

    **Arguments:**

    - `loss`: any loss on pairs.

    **Returns:**

    A loss of the same form, for `score=partial(dpx.score_pairs, confidence=True)`.

    **Raises:**

    The result raises `ValueError` if the confidences are missing.

    ??? cite

        Zhou et al., *WPO: Enhancing RLHF with Weighted Preference Optimization*, 2024, equation 2
        (arXiv 2406.11827).
    """

    @functools.wraps(loss)
    def weighted(policy: PairLogProbs, reference: PairLogProbs | None, **keywords) -> PairLoss:
        result = loss(policy, reference, **keywords)
        return replace(result, loss=times(_confidence(policy), result.loss))

    return marked(weighted, Marks(inner=(loss,)))


def _confidence(policy: PairLogProbs) -> Float[Array, " pairs"]:
    chosen, rejected = policy.chosen_confidence, policy.rejected_confidence
    if chosen is None or rejected is None:
        raise ValueError(
            "`wpo` needs `policy.chosen_confidence` and `policy.rejected_confidence` and got none. "
            "Ask the score for them: `score=partial(dpx.score_pairs, confidence=True)`."
        )
    return jax.lax.stop_gradient(wide(chosen) * wide(rejected))


def _uniform(log_probs: LogProbs) -> LogProbs:
    """`log_probs` with every log-probability 0."""
    names = ("chosen", "rejected") if isinstance(log_probs, PairLogProbs) else ("completion", "kl")
    values = {name: getattr(log_probs, name) for name in names}
    zeros = {name: jnp.zeros_like(x) for name, x in values.items() if x is not None}
    return replace(log_probs, **zeros)


def _routed(losses: Sequence[Callable[..., Any]], keywords: dict[str, Any]) -> list[dict[str, Any]]:
    """For each loss, the part of `keywords` that it takes and has not bound."""
    routed = [{k: v for k, v in keywords.items() if takes(loss, k)} for loss in losses]
    for keyword in keywords:
        if not any(keyword in arguments for arguments in routed):
            raise ValueError(
                f"`{keyword}` must be a keyword that a term of `combine` takes and has not bound "
                f"by `partial`; the terms are {', '.join(f'`{_name(loss)}`' for loss in losses)}."
            )
    return routed


def _name(loss: Callable[..., Any]) -> str:
    function = next(parts(loss))[0]
    return getattr(function, "__name__", repr(function))
