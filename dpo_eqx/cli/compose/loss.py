"""From settings to the loss: its names, weights and hyper-parameters.

`optimizer.py` makes the optimiser, and `policy.py` the policy and its reference.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp

from ... import losses
from ..._arrays.log_probs import PairLogProbs, UnpairedLogProbs
from ...losses._marks import marks_of, parts
from ...protocols import Loss
from ..settings.check import REWARD_LOSS, flag
from ..settings.options import as_number, near, split_pairs
from ..settings.settings import Settings

DIVERGENCES = {
    "reverse_kl": losses.reverse_kl,
    "forward_kl": losses.forward_kl,
    "jensen_shannon": losses.jensen_shannon,
}


# The functions of `losses` that have another name in `losses.BY_NAME`, and what papers call them.
OTHER_NAMES = {
    "dpo": losses.dpo,
    "cdpo": losses.dpo,
    "robust_dpo": losses.robust_dpo,
    "exo": losses.exo,
    "nca": losses.nca,
    "sppo": losses.sppo,
    "alpha_po": losses.alpha_po,
    REWARD_LOSS: losses.bradley_terry,
}


def compose_loss(settings: Settings) -> Loss:
    """The loss that the settings ask for, with its hyper-parameters bound.

    **Raises:**

    `ValueError` if a name is unknown, if no loss has a given hyper-parameter or its value is out of
    range, or if losses of pairs are combined with losses of single completions.
    """
    terms = [_named(name) for name in settings.loss]
    if "cdpo" in settings.loss and settings.label_smoothing is None:
        raise ValueError(
            "`--loss cdpo` is `sigmoid` with an assumed fraction of flipped labels; give that as "
            "`--label-smoothing`, such as 0.1."
        )
    hyper_parameters = _hyper_parameters(settings)
    for name, (value, source) in hyper_parameters.items():
        if not any(_takes(term, name) for term in terms):
            raise ValueError(
                f"{source} is {value!r}, but none of the losses {', '.join(settings.loss)} has "
                f"`{name}`; they have {_known(terms)}.{near(name, _keywords(terms))} Leave out "
                f"{source}, or give another loss."
            )
    values = {name: value for name, (value, _) in hyper_parameters.items()}
    bound = [_bind(term, values) for term in terms]
    weights = settings.loss_weights or (1.0,) * len(bound)
    is_single = len(bound) == 1 and weights[0] == 1
    loss = bound[0] if is_single else losses.combine(*zip(weights, bound, strict=True))
    loss = losses.reference_free(loss) if settings.reference_free else loss
    if settings.wpo and needs_labels(loss):
        raise ValueError(
            "`--wpo` weighs pairs, and `--loss` is of single completions; got `--loss "
            f"{' '.join(settings.loss)}`. Leave out `--wpo`."
        )
    loss = losses.wpo(loss) if settings.wpo else loss
    # A value out of range is only found by calling the loss. Do so before any file is read.
    _try(loss, with_reference=True)
    return loss


def _named(name: str) -> Loss:
    known = {**losses.BY_NAME, **OTHER_NAMES}
    if name not in known:
        names = ", ".join(sorted(known))
        raise ValueError(f"`--loss` must be one of {names}; got {name!r}.{near(name, known)}")
    return known[name]


def takes_offset(settings: Settings) -> bool:
    """Whether a loss of the settings has an offset for each pair."""
    return any("offset" in keywords(_named(name)) for name in settings.loss)


def takes_rows(loss: Loss, *, unpaired: bool) -> bool:
    """Whether `loss` can learn from single completions, or from pairs; `sft` takes both."""
    return unpaired in _kinds(loss)


def needs_labels(loss: Loss) -> bool:
    """Whether a part of `loss` compares desirable completions with undesirable ones."""
    return any(_kinds_of(part) == {True} for part in _functions(loss))


def needs_reference(loss: Loss) -> bool:
    """Whether `loss` raises an error if it gets no reference."""
    try:
        _try(loss, with_reference=False)
    except ValueError:
        return True
    return False


def needs_mismatched(loss: Loss) -> bool:
    """Whether a loss of single completions uses completions of other prompts, as KTO does."""
    numbers, counts = jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.int32)
    log_probs = UnpairedLogProbs(numbers, jnp.array([True, False]), None, counts, numbers)
    try:
        jax.eval_shape(lambda: loss(log_probs, log_probs).loss)
    except ValueError:
        return True
    return False


def takes_of_pairs(loss: Loss, name: str) -> bool:
    """Whether `loss` can be given the hyper-parameter `name` for each pair."""
    return any(_takes(part, name) for part in _functions(loss))


def _hyper_parameters(settings: Settings) -> dict[str, tuple[Any, str]]:
    """The value of each given hyper-parameter, and the flag that gave it, by name."""
    values: dict[str, tuple[Any, str]] = {}
    for name in ("beta", "label_smoothing"):
        value = getattr(settings, name)
        if value is not None:
            values[name] = value, flag(name)
    if settings.divergence is not None:
        values["divergence"] = _divergence(settings.divergence), flag("divergence")
    for name, text in split_pairs(settings.loss_options, "--loss-options").items():
        if name in values:
            raise ValueError(
                f"`--loss-options` and {values[name][1]} both give `{name}`; leave out one of them."
            )
        values[name] = as_number(text, f"--loss-options {name}="), f"`--loss-options {name}`"
    return values


def _divergence(text: str) -> Callable[..., Any]:
    name, _, value = text.partition("=")
    if name == "alpha_divergence" and value:
        return losses.alpha_divergence(as_number(value, "--divergence alpha_divergence="))
    if text not in DIVERGENCES:
        known = ", ".join([*DIVERGENCES, "alpha_divergence=A"])
        raise ValueError(f"`--divergence` must be one of {known}; got {text!r}.")
    return DIVERGENCES[text]


def _bind(loss: Loss, values: dict[str, Any]) -> Loss:
    options = {name: value for name, value in values.items() if _takes(loss, name)}
    return functools.partial(loss, **options) if options else loss


def _takes(loss: Loss, name: str) -> bool:
    return name in keywords(loss)


def keywords(loss: Loss) -> list[str]:
    """The names of the hyper-parameters of a loss."""
    parameters = inspect.signature(loss).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _known(terms: list[Loss]) -> str:
    return ", ".join(f"`{name}`" for name in _keywords(terms)) or "none"


def _keywords(terms: list[Loss]) -> list[str]:
    return sorted({name for term in terms for name in keywords(term)})


def _functions(loss: Loss) -> list[Loss]:
    """The functions that `loss` is made of, without those that only combine other losses."""
    return [part for part, _ in parts(loss) if not marks_of(part).inner]


def _kinds(loss: Loss) -> set[bool]:
    """The kinds of rows that all parts of `loss` take: true for single completions."""
    return set.intersection(*(_kinds_of(part) for part in _functions(loss)))


def _kinds_of(function: Loss) -> set[bool]:
    annotation = next(iter(inspect.signature(function).parameters.values())).annotation
    return {kind is UnpairedLogProbs for kind in get_args(annotation) or (annotation,)}


def _try(loss: Loss, *, with_reference: bool) -> None:
    """Traces `loss` on two pairs, so that its errors are raised before any file is read."""
    kinds = _kinds(loss)
    if not kinds:
        raise ValueError(
            "`--loss` must be losses of pairs only, or of single completions only; got both. Leave "
            "out the losses of one kind."
        )
    numbers = jnp.zeros(2, jnp.float32)
    counts = jnp.ones(2, jnp.int32)
    if kinds == {True}:
        log_probs = UnpairedLogProbs(numbers, jnp.array([True, False]), numbers, counts, numbers)
    else:
        log_probs = PairLogProbs(numbers, numbers, counts, counts, numbers, numbers, numbers)
    try:
        jax.eval_shape(lambda: loss(log_probs, log_probs if with_reference else None).loss)
    except TypeError as error:
        raise ValueError(f"`--loss-options` must give what the loss needs: {error}.") from None
