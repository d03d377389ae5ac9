"""From settings to the policy, what of it is trained, and its reference.

Loss and optimiser are in `compose.py` and `optimizers.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .. import data, models
from ..reference import snapshot
from .rows import Prepared, with_reference
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where a step finds the reference: at most one of the two.

    - `policy`: one that does not learn.
    - `view`: what makes it from the policy, for `reference_of=`.
    - `words`: which it is, for people.
    """

    words: str
    policy: PyTree = None
    view: Callable[[Any], Any] | None = None


def load_policy(settings: Settings) -> models.Transformer:
    """The model to start from, with new adapters where they are asked for."""
    policy = _load(settings.model, settings, remat=settings.remat)
    if not settings.lora_rank:
        return policy
    return models.add_lora(
        policy,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        target=settings.lora_target,
        key=jax.random.key(settings.seed),
    )


def trainable_of(policy: PyTree, settings: Settings) -> PyTree:
    """The filter of what is trained: the adapters, or all parameters."""
    return models.lora_filter(policy) if settings.lora_rank else eqx.is_inexact_array


def choose_reference(
    policy: PyTree, settings: Settings, prepared: Prepared, *, needed: bool
) -> Reference:
    """The reference that the settings ask for.

    **Raises:**

    `ValueError` where the loss does not need the one that was asked for.
    """
    if not needed:
        _check_not_asked_for(settings)
        return Reference("none, for the loss does not use one")
    if any(name.startswith("reference_") for name in prepared.form.numbers):
        return Reference("the log-probabilities in the data")
    if settings.reference is not None:
        return Reference(settings.reference, _load(settings.reference, settings))
    if settings.lora_rank:
        return Reference("the model without its adapters", view=models.without_lora)
    return Reference("the model as it is now", snapshot(policy))


def precompute(
    reference: Reference, policy: PyTree, prepared: list[Prepared], settings: Settings
) -> tuple[Reference, list[Prepared]]:
    """The rows with the reference's log-probabilities, and no reference to run any more."""
    source = reference.policy if reference.view is None else reference.view(policy)

    def cache(rows):
        return data.cache_reference(
            source,
            rows,
            batch_size=settings.batch_size,
            microbatches=settings.microbatches,
            compute_dtype=dtype_of(settings.compute_dtype),
            folder=settings.cache,
        )

    rows = [with_reference(each, cache) for each in prepared]
    return Reference(f"{reference.words}, computed once"), rows


def dtype_of(name: str | None) -> Any:
    """The dtype of this name, if there is one."""
    return None if name is None else jnp.dtype(name)


def count(tree: PyTree) -> int:
    """How many numbers the arrays of a pytree hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


def _load(path: str, settings: Settings, *, remat: bool = False) -> models.Transformer:
    return models.load(path, dtype=dtype_of(settings.dtype), remat=remat)


def _check_not_asked_for(settings: Settings) -> None:
    asked = {
        "--reference": settings.reference is not None,
        "--precompute-reference": settings.precompute_reference,
        "--sync-reference-every": settings.sync_reference_every > 0,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"`{name}` is given, but `--loss {' '.join(settings.loss)}` uses no reference; "
                "leave it out."
            )
