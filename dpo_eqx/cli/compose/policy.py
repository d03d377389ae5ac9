"""From settings to the policy, the filter of its trained parameters, and its reference.

`loss.py` makes the loss, and `optimizer.py` the optimiser.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import DTypeLike, PyTree

from ... import data, models, sharding
from ..._policies.trainable import trainable
from ..._training.reference import snapshot
from ...models._adapters.lora import adapters
from ...models._adapters.whole_module import WholeModule
from ..settings.options import dtype_of
from ..settings.settings import Settings
from ..settings.shared_flags import language_model
from ..settings.words import naming
from .data import Prepared
from .dtypes import keep_trained_wide, keep_wide


@dataclasses.dataclass(frozen=True)
class Reference:
    """The reference of a step: a policy, a view of the trained policy, or neither.

    - `words`: a description of the reference, for the user.
    - `policy`: a policy that is not trained.
    - `view`: a function from the trained policy to the reference, for `reference_of=`.
    """

    words: str
    policy: PyTree = None
    view: Callable[[Any], Any] | None = None


def load_policy(
    settings: Settings, mesh: Mesh | None = None
) -> models.Transformer | models.RewardModel:
    """The model to train, with the adapters that the settings ask for, new or from `--lora`.

    With `--reward-head` it is a reward model: that of the checkpoint, or the checkpoint's policy
    with a new head or with that of `--lora`. Beside adapters the head is trained whole. Parameters
    are in `--dtype`, or as stored in the checkpoint.
    """
    if settings.reward_head:
        return _load_reward_model(settings, mesh)
    policy = _load(settings.model, settings, mesh, remat=settings.remat)
    if settings.lora is not None:
        policy = language_model(_with_lora(policy, settings, settings.lora), settings.lora)
        # The reference needs the adapters as they are now, and training changes them.
        return models.pin_lora(policy) if settings.lora_reference == "adapter" else policy
    return with_new_adapters(policy, settings)


def _load_reward_model(settings: Settings, mesh: Mesh | None) -> models.RewardModel:
    model = _load_any(settings.model, settings, mesh, remat=settings.remat)
    if settings.lora is not None:
        # The file has the head of a policy's adapter. A reward model may keep its own.
        adapted = _with_lora(model, settings, settings.lora)
        return with_whole_head(_reward_model(adapted, settings.lora))
    if not isinstance(model, models.RewardModel):
        model = models.RewardModel(model, key=jax.random.key(settings.seed))
    if not settings.lora_rank:
        return model
    # The patterns of the flags are for paths in the decoder.
    body = with_new_adapters(model.body, settings)
    return with_whole_head(eqx.tree_at(lambda model: model.body, model, body))


def _with_lora(
    model: models.Transformer | models.RewardModel, settings: Settings, lora: str
) -> models.Transformer | models.RewardModel:
    """The model with the adapters in the folder `lora`, which `--lora` gave."""
    with naming("--lora"):
        return models.load_lora(model, lora, dropout=settings.lora_dropout)


def _reward_model(
    adapted: models.Transformer | models.RewardModel, lora: str
) -> models.RewardModel:
    """The model with the adapters of `lora`, or a `ValueError` if it is not a reward model."""
    if isinstance(adapted, models.RewardModel):
        return adapted
    raise ValueError(
        f"`--lora` must hold adapters of a reward model with `--reward-head`; {lora} holds those "
        "of a language model, without a head. Merge them first: give the `model/` that the run of "
        "these adapters wrote as `--model`, and `--lora-rank` for new adapters."
    )


def with_whole_head(model: models.RewardModel) -> models.RewardModel:
    """The reward model whose head is trained whole beside adapters."""
    if isinstance(model.head, WholeModule):
        return model
    return eqx.tree_at(lambda model: model.head, model, WholeModule.of(model.head))


def with_new_adapters(policy: models.Transformer, settings: Settings) -> models.Transformer:
    """The policy with adapters of `--lora-rank`, or unchanged if that is 0."""
    if not settings.lora_rank:
        return policy
    return models.add_lora(
        policy,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        target=settings.lora_target,
        rank_stabilised=settings.lora_rslora,
        dropout=settings.lora_dropout,
        dora=settings.lora_dora,
        modules_to_save=settings.lora_modules_to_save,
        key=jax.random.key(settings.seed),
    )


def trainable_of(policy: PyTree, settings: Settings) -> PyTree:
    """The filter of what is trained: the adapters, what `--train` and `--freeze` leave, or all.

    **Raises:**

    `ValueError` if a pattern matches no parameter, or if nothing is left to train.
    """
    if has_adapters(settings):
        return models.lora_filter(policy)
    if not settings.train and not settings.freeze:
        return eqx.is_inexact_array
    return trainable(policy, only=settings.train or None, without=settings.freeze or None)


def has_adapters(settings: Settings) -> bool:
    """Whether adapters are trained, rather than the model."""
    return settings.lora_rank > 0 or settings.lora is not None


def adapters_alone(policy: PyTree, selected: PyTree) -> PyTree:
    """The part of a policy with adapters that `models.save_lora` needs.

    PEFT stores the lengths of all rows of a layer of its checkpoints. With DoRA, some of them may
    depend on the base.
    """
    has_lengths = any(lora.magnitude is not None for lora in adapters(policy).values())
    return policy if has_lengths else eqx.filter(policy, selected)


def draws_numbers(settings: Settings) -> bool:
    """Whether steps need a random key, for the dropout of the model or of adapters."""
    return settings.dropout or settings.lora_dropout > 0


def choose_reference(
    policy: PyTree,
    settings: Settings,
    prepared: Prepared,
    *,
    needed: bool,
    mesh: Mesh | None = None,
) -> Reference:
    """The reference that the settings ask for.

    **Arguments:**

    - `policy`: the policy before training.
    - `prepared`: the training data.
    - `needed`: whether the loss uses a reference.
    - `mesh`: the mesh of the run, if any.

    **Raises:**

    `ValueError` if the settings ask for a reference that the loss does not use, or if `--lora` is
    given without `--lora-reference`.
    """
    if not needed:
        _check_not_asked_for(settings)
        return Reference("none, since the loss does not use a reference")
    if any(name.startswith("reference_") for name in prepared.form.numbers):
        return Reference("the log-probabilities in the data")
    if settings.reference is not None:
        other = _load(settings.reference, settings, mesh)
        return Reference(settings.reference, _with_wide_dtype(other, settings))
    if settings.lora is not None and settings.lora_reference is None:
        raise ValueError(
            "`--lora-reference` must be given with `--lora`; got none. Give `base` for the model "
            "without adapters, or `adapter` for the model with the adapters that the run starts "
            "from."
        )
    if settings.lora_reference == "adapter":
        return Reference("the model with its adapters as they are now", view=models.pinned_lora)
    # The base is frozen, so the policy without its adapters is the reference, at no memory.
    if has_adapters(settings):
        return Reference("the model without its adapters", view=models.without_lora)
    return Reference("the model as it is now", _with_wide_dtype(snapshot(policy), settings))


def starting_policy(settings: Settings, mesh: Mesh | None, trainable: PyTree) -> PyTree:
    """The policy before the first step, in the dtypes of training; it is loaded again."""
    policy = keep_trained_wide(load_policy(settings, mesh), trainable, settings)
    return policy if mesh is None else sharding.shard_policy(policy, mesh)


def precompute(
    reference: Reference,
    policy: PyTree,
    prepared: list[Prepared],
    settings: Settings,
    compute_dtype: DTypeLike,
    mesh: Mesh | None = None,
) -> tuple[Reference, list[Prepared]]:
    """Replaces the reference by its log-probabilities of all rows, computed once.

    **Returns:**

    A `Reference` without a policy, and `prepared` with the log-probabilities in its rows.
    """
    source = reference.policy if reference.view is None else reference.view(policy)
    cache = functools.partial(
        data.cache_reference,
        source,
        batch_size=settings.batch_size,
        microbatches=settings.microbatches,
        compute_dtype=compute_dtype,
        folder=settings.cache,
        mesh=mesh,
    )
    prepared = [dataclasses.replace(p, rows=cache(p.rows)) for p in prepared]
    return Reference(f"{reference.words}, computed once"), prepared


def count(tree: PyTree) -> int:
    """The number of elements in all arrays of a pytree."""
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))


def parameters(policy: PyTree) -> int:
    """The number of parameters of a policy, without pinned adapters and originals of modules.

    Quantised weights count as the weights that they stand for.
    """
    decoded = jax.eval_shape(models.dequantize, eqx.filter(policy, eqx.is_array))
    leaves = jax.tree_util.tree_leaves_with_path(decoded)
    copies = re.compile(r"\.(pinned|original)\b")
    return sum(leaf.size for path, leaf in leaves if not copies.search(jax.tree_util.keystr(path)))


def _load(
    path: str, settings: Settings, mesh: Mesh | None, *, remat: bool = False
) -> models.Transformer:
    return language_model(_load_any(path, settings, mesh, remat=remat), path)


def _load_any(
    path: str, settings: Settings, mesh: Mesh | None, *, remat: bool = False
) -> models.Transformer | models.RewardModel:
    placement = None if mesh is None else sharding.placement(mesh)
    return models.load(
        path,
        dtype=dtype_of(settings.dtype),
        sharding=placement,
        quantize=settings.quantize,
        dropout=settings.dropout,
        remat=remat,
        unroll=settings.unroll,
        fused=settings.fused,
    )


def _with_wide_dtype(reference: PyTree, settings: Settings) -> PyTree:
    """The reference as loaded, or in float32, like the policy, if it moves towards the policy."""
    return keep_wide(reference, settings) if settings.sync_reference_every else reference


def _check_not_asked_for(settings: Settings) -> None:
    flags = {
        "--reference": settings.reference is not None,
        "--precompute-reference": settings.precompute_reference,
        "--sync-reference-every": settings.sync_reference_every > 0,
        "--lora-reference": settings.lora_reference is not None,
    }
    for name, is_given in flags.items():
        if is_given:
            raise ValueError(
                f"`{name}` is given, but `--loss {' '.join(settings.loss)}` uses no reference; "
                f"leave out `{name}`."
            )
