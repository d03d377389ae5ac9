"""The dtypes of a run: of trained parameters, of the forward pass, of the finished model.

A bfloat16 weight keeps no update below half the distance to its neighbour, and at DPO's learning
rates almost every update is that small. So trained parameters are in float32, and bfloat16 is only
for computing.
"""

import dataclasses
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ... import models
from ..._jax.dtypes import in_dtype, in_float32_at_least
from ..._jax.paths import leaf_name
from ...models._checkpoint.folder import CONFIG, DTYPES, Weights, read_json, resolve
from ..settings.settings import Settings

Tree = TypeVar("Tree", bound=PyTree)


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """The dtypes in which a run computes and saves.

    - `compute`: the dtype of the forward pass.
    - `saved`: the dtype of the finished model; `None` saves each parameter in the dtype that it was
        loaded in.
    """

    compute: np.dtype
    saved: np.dtype | None

    def __str__(self) -> str:
        saved = "as in the checkpoint" if self.saved is None else f"in {self.saved}"
        return f"computed in {self.compute}, saved {saved}"


def choose_dtypes(settings: Settings) -> Dtypes:
    """The dtypes that the settings ask for, by default the dtype of the checkpoint.

    If `--dtype` is narrower than the checkpoint, it is the default instead, since loading in it
    drops the wider digits.
    """
    kinds = stored_kinds(settings.model)
    default = _main_dtype(settings.model, kinds)
    if settings.dtype is not None:
        default = min(jnp.dtype(settings.dtype), default, key=_bits)
    is_mixed = len(kinds) > 1 and settings.dtype is None
    saved = settings.save_dtype or (None if is_mixed else default)
    return Dtypes(
        compute=jnp.dtype(settings.compute_dtype or default),
        saved=None if saved is None else jnp.dtype(saved),
    )


def stored_kinds(model: str) -> set[str]:
    """The names of the floating-point dtypes in a checkpoint; its weights are not read."""
    return {DTYPES[kind] for kind in Weights(resolve(model)).dtypes.values() if kind in DTYPES}


def keep_wide(tree: Tree, settings: Settings) -> Tree:
    """`tree` in float32 if it was narrower, unless `--dtype` is given.

    It is for parameters that change by small amounts: trained parameters, and a reference that
    moves towards them.
    """
    return in_float32_at_least(tree) if settings.dtype is None else tree


def keep_trained_wide(policy: Tree, trainable: PyTree, settings: Settings) -> Tree:
    """The policy with its trained parameters as from `keep_wide`, and frozen ones unchanged."""
    params, frozen = eqx.partition(policy, trainable)
    return eqx.combine(keep_wide(params, settings), frozen)


def dtypes_of(params: PyTree) -> PyTree:
    """The dtype of each array."""
    return jax.tree.map(lambda x: x.dtype, params)


def finished(policy: Tree, saved: np.dtype | None, trainable: PyTree, loaded: PyTree) -> Tree:
    """The policy to save: its adapters merged, and each weight rounded once.

    **Arguments:**

    - `policy`: the trained policy.
    - `saved`: the dtype to save in; `None` saves each parameter in the dtype that it was loaded in.
    - `trainable`: the filter of the trained parameters.
    - `loaded`: the dtypes in which the trained parameters were loaded.
    """
    if saved is None:
        params, frozen = eqx.partition(policy, trainable)
        params = jax.tree.map(lambda x, dtype: x.astype(dtype), params, loaded)
        return models.merge_lora(eqx.combine(params, frozen))
    if _base_dtypes(policy) != {saved}:
        # A merge in the dtype of the base would round the weights to that dtype first.
        policy = in_float32_at_least(models.dequantize(policy))
    return in_dtype(models.merge_lora(policy), saved)


def check_saved(policy: PyTree, settings: Settings) -> None:
    """Raises `ValueError` if float16 made values of the finished model infinite.

    **Arguments:**

    - `policy`: the policy to save, on the host.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(policy, eqx.is_inexact_array)):
        if leaf.dtype == np.float16 and not np.isfinite(leaf).all():
            name = leaf_name(path)
            raise ValueError(
                f"The finished model cannot be saved in float16: `{name}` has values beyond "
                f"{np.finfo(np.float16).max}. The last checkpoint in {settings.output} is not "
                "affected; give `--resume --save-dtype float32` to write the model from it."
            )


def narrow_warning(params: PyTree, settings: Settings) -> str | None:
    """The warning to a user who trains parameters in half precision; `None` if none is needed."""
    narrow = sorted({str(x.dtype) for x in jax.tree.leaves(params) if _bits(x.dtype) < 32})
    if not narrow:
        return None
    # A weight is at most 2 / eps times the distance to its neighbour, and half of that is rounded.
    part = int(4 / float(jnp.finfo(narrow[0]).eps))
    return (
        f"`--dtype {settings.dtype}` keeps the trained parameters in {narrow[0]}, which rounds "
        f"away every update below 1/{part} of its weight. At DPO's learning rates these are almost "
        "all updates. Leave out `--dtype` to train the parameters in float32; the forward pass and "
        "the finished model then have the checkpoint's dtype."
    )


def _main_dtype(model: str, kinds: set[str]) -> np.dtype:
    """The dtype of a checkpoint.

    If its tensors have several dtypes, this is the one that `config.json` names, or the widest.
    """
    config = read_json(resolve(model) / CONFIG)
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if named in kinds:
        return jnp.dtype(named)
    return max(map(jnp.dtype, sorted(kinds)), key=_bits)


def _base_dtypes(policy: PyTree) -> set[np.dtype]:
    """The dtypes of the model without its adapters; no quantised weight is decoded."""

    def without_adapters(arrays: PyTree) -> PyTree:
        return models.without_lora(models.dequantize(arrays))

    base = jax.eval_shape(without_adapters, eqx.filter(policy, eqx.is_array))
    return {leaf.dtype for leaf in jax.tree.leaves(base) if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits
