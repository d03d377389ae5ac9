"""From settings to the policy, what of it is trained, and its reference.

Loss and optimiser are in `loss.py` and `optimizer.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import DTypeLike, PyTree

from ... import data, models, sharding
from ..._training.reference import snapshot
from ..settings.options import dtype_of
from ..settings.settings import Settings
from .data import Prepared, with_reference
from .dtypes import keep_wide


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


def load_policy(settings: Settings, mesh: Mesh | None = None) -> models.Transformer:
    """The model to start from, with the adapters that are asked for, new ones or others.

    Its parameters are in `--dtype`, or as stored in the checkpoint.
    """
    policy = _load(settings.model, settings, mesh, remat=settings.remat)
    if settings.lora is not None:
        policy = models.load_lora(policy, settings.lora)
        return models.pin_lora(policy) if settings.lora_reference == "adapter" else policy
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
    return models.lora_filter(policy) if has_adapters(settings) else eqx.is_inexact_array


def has_adapters(settings: Settings) -> bool:
    """Whether adapters are trained, and not the model."""
    return settings.lora_rank > 0 or settings.lora is not None


def choose_reference(
    policy: PyTree,
    settings: Settings,
    prepared: Prepared,
    *,
    needed: bool,
    mesh: Mesh | None = None,
) -> Reference:
    """The reference that the settings ask for.

    **Raises:**

    `ValueError` where the loss does not need the one that was asked for, and where it could be
    either of two and it was not said which.
    """
    if not needed:
        _check_not_asked_for(settings)
        return Reference("none, for the loss does not use one")
    if any(name.startswith("reference_") for name in prepared.form.numbers):
        return Reference("the log-probabilities in the data")
    if settings.reference is not None:
        other = _load(settings.reference, settings, mesh)
        return Reference(settings.reference, _to_be_kept(other, settings))
    if settings.lora is not None and settings.lora_reference is None:
        raise ValueError(
            "`--lora` leaves open what the reference is; say it by `--lora-reference base`, the "
            "model without adapters, or `--lora-reference adapter`, the one that the run begins "
            "with."
        )
    if settings.lora_reference == "adapter":
        return Reference("the model with its adapters as they are now", view=models.pinned_lora)
    if has_adapters(settings):
        return Reference("the model without its adapters", view=models.without_lora)
    return Reference("the model as it is now", _to_be_kept(snapshot(policy), settings))


def precompute(
    reference: Reference,
    policy: PyTree,
    prepared: list[Prepared],
    settings: Settings,
    compute_dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> tuple[Reference, list[Prepared]]:
    """The rows with the reference's log-probabilities, and no reference to run any more."""
    source = reference.policy if reference.view is None else reference.view(policy)

    def cache(rows):
        return data.cache_reference(
            source,
            rows,
            batch_size=settings.batch_size,
            microbatches=settings.microbatches,
            compute_dtype=compute_dtype,
            folder=settings.cache,
            mesh=mesh,
        )

    rows = [with_reference(each, cache) for each in prepared]
    return Reference(f"{reference.words}, computed once"), rows


def count(tree: PyTree) -> int:
    """How many numbers the arrays of a pytree hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


def parameters(policy: PyTree) -> int:
    """How many numbers a policy is made of: quantised weights decoded, pinned adapters left out."""
    whole = jax.eval_shape(models.dequantize, eqx.filter(policy, eqx.is_array))
    leaves = jax.tree_util.tree_leaves_with_path(whole)
    return sum(leaf.size for path, leaf in leaves if ".pinned" not in jax.tree_util.keystr(path))


def _load(
    path: str, settings: Settings, mesh: Mesh | None, *, remat: bool = False
) -> models.Transformer:
    place = None if mesh is None else sharding.placement(mesh)
    return models.load(
        path,
        dtype=dtype_of(settings.dtype),
        sharding=place,
        quantize=settings.quantize,
        remat=remat,
        fused=settings.fused,
    )


def _to_be_kept(reference: PyTree, settings: Settings) -> PyTree:
    """The reference as it is loaded; one that moves towards the policy in float32, as that is."""
    return keep_wide(reference, settings) if settings.sync_reference_every else reference


def _check_not_asked_for(settings: Settings) -> None:
    asked = {
        "--reference": settings.reference is not None,
        "--precompute-reference": settings.precompute_reference,
        "--sync-reference-every": settings.sync_reference_every > 0,
        "--lora-reference": settings.lora_reference is not None,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"`{name}` is given, but `--loss {' '.join(settings.loss)}` uses no reference; "
                "leave it out."
            )
