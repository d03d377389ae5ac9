"""The dtypes of a run: of the parameters in training, of the computation, of the finished model.

A bfloat16 weight keeps no update that is below half the distance to its neighbour, and almost
every update at DPO's learning rates is. So what is trained is kept in float32; bfloat16 is for
computing.
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
from ...models._checkpoint.folder import CONFIG, DTYPES, Weights, read_json, resolve
from ..settings.settings import Settings

Tree = TypeVar("Tree", bound=PyTree)


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """What a run computes in and saves in.

    - `compute`: the dtype of the forward pass.
    - `saved`: the dtype of the finished model; `None` if each parameter gets the one it came in.
    """

    compute: np.dtype
    saved: np.dtype | None

    def __str__(self) -> str:
        saved = "as in the checkpoint" if self.saved is None else f"in {self.saved}"
        return f"computed in {self.compute}, saved {saved}"


def choose_dtypes(settings: Settings) -> Dtypes:
    """The dtypes that the settings ask for, by default those of the checkpoint.

    If `--dtype` is narrower than the checkpoint, it is the default: nothing wider is left.
    """
    kinds = stored_kinds(settings.model)
    default = _main_dtype(settings.model, kinds)
    if settings.dtype is not None:
        default = min(jnp.dtype(settings.dtype), default, key=_bits)
    mixed = len(kinds) > 1 and settings.dtype is None
    saved = settings.save_dtype or (None if mixed else default)
    return Dtypes(
        compute=jnp.dtype(settings.compute_dtype or default),
        saved=None if saved is None else jnp.dtype(saved),
    )


def stored_kinds(model: str) -> set[str]:
    """The names of the floating-point dtypes in a checkpoint, whose weights are not read."""
    return {DTYPES[kind] for kind in Weights(resolve(model)).dtypes.values() if kind in DTYPES}


def keep_wide(tree: Tree, settings: Settings) -> Tree:
    """`tree` in float32 if it was narrower, unless `--dtype` is given.

    It is for what moves by small amounts: what is trained, and a reference that follows it.
    """
    return in_float32_at_least(tree) if settings.dtype is None else tree


def keep_trained_wide(policy: Tree, trainable: PyTree, settings: Settings) -> Tree:
    """The policy with what is trained as `keep_wide` makes it, and what is frozen as it is."""
    params, frozen = eqx.partition(policy, trainable)
    return eqx.combine(keep_wide(params, settings), frozen)


def dtypes_of(params: PyTree) -> PyTree:
    """The dtype of each array."""
    return jax.tree.map(lambda x: x.dtype, params)


def finished(
    policy: models.Transformer, saved: np.dtype | None, trainable: PyTree, loaded: PyTree
) -> models.Transformer:
    """The policy to be written: its adapters merged, and each weight rounded once.

    **Arguments:**

    - `saved`: the dtype to write; `None` is, for each parameter, the one that it was loaded in.
    - `trainable`: the filter of what was trained; `loaded`: the dtypes that those came in.
    """
    if saved is None:
        params, frozen = eqx.partition(policy, trainable)
        params = jax.tree.map(lambda x, dtype: x.astype(dtype), params, loaded)
        return models.merge_lora(eqx.combine(params, frozen))
    if _base_dtypes(policy) != {saved}:
        # Merged in the dtype of the base, the weights would be rounded to that one as well.
        policy = in_float32_at_least(models.dequantize(policy))
    return in_dtype(models.merge_lora(policy), saved)


def check_saved(policy: PyTree, settings: Settings) -> None:
    """Raises if the finished model has infinities that training did not make, as float16 may.

    **Arguments:**

    - `policy`: as it is to be written, on the host.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(policy, eqx.is_inexact_array)):
        if leaf.dtype == np.float16 and not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"The finished model cannot be saved in float16: `{name}` has values beyond "
                f"{np.finfo(np.float16).max}. The last checkpoint in {settings.output} is whole; "
                "give `--resume --save-dtype float32` to write the model from it."
            )


def narrow_warning(params: PyTree, settings: Settings) -> str | None:
    """What to tell whoever trains parameters in half precision; `None` if nobody does."""
    narrow = sorted({str(x.dtype) for x in jax.tree.leaves(params) if _bits(x.dtype) < 32})
    if not narrow:
        return None
    # A weight is at most 2 / eps times the distance to its neighbour.
    part = int(4 / float(jnp.finfo(narrow[0]).eps))
    return (
        f"`--dtype {settings.dtype}` keeps the trained parameters in {narrow[0]}, which rounds "
        f"away every update below 1/{part} of its weight: at DPO's learning rates almost all of "
        "them. Leave `--dtype` out to keep what is trained in float32; the forward pass and the "
        "finished model then have the checkpoint's dtype."
    )


def _main_dtype(model: str, kinds: set[str]) -> np.dtype:
    """The dtype of a checkpoint; if there are several, the one that `config.json` names."""
    config = read_json(resolve(model) / CONFIG)
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    if named in kinds:
        return jnp.dtype(named)
    return max(map(jnp.dtype, sorted(kinds)), key=_bits)


def _base_dtypes(policy: PyTree) -> set[np.dtype]:
    """The dtypes of the model under its adapters; nothing is decoded."""

    def plain(arrays):
        return models.without_lora(models.dequantize(arrays))

    base = jax.eval_shape(plain, eqx.filter(policy, eqx.is_array))
    return {leaf.dtype for leaf in jax.tree.leaves(base) if jnp.issubdtype(leaf.dtype, jnp.inexact)}


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits
