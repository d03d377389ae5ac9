"""The magnitudes of DoRA in PEFT's files: one vector for each linear layer of a checkpoint.

PEFT stores the lengths of rows, and our adapters hold how they changed. `load.py` reads the other
tensors, and `save.py` writes them.
"""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..._jax.paths import leaf_name
from .._adapters.first_values import first_magnitude
from .._adapters.lora_layer import LoRA
from .._adapters.magnitude import Magnitude
from .._adapters.quantize import is_linear, weight_shape
from .._checkpoint.folder import Weights
from .._decoder.transformer import Transformer
from .checkpoint_layers import Site
from .checks import magnitude_name

Lengths = Float[np.ndarray, "layers out"]


def read_lengths(weights: Weights, site: Site, adapted: Set[str]) -> dict[str, Lengths]:
    """The lengths of the rows of each of our layers; infinity in a layer without an adapter.

    `adapted` has the names of all modules and parameters with an adapter.
    """
    nothing = np.full(site.outputs, np.inf, np.float32)
    whole = np.stack(
        [
            weights.read(magnitude_name(name)) if name in adapted else nothing
            for name in site.names()
        ]
    )
    return {path: whole[:, rows] for path, rows in zip(site.paths, site.rows, strict=True)}


def with_lengths(layer: Any, lora: LoRA | None, lengths: Lengths) -> Any:
    """A layer whose rows have these lengths, with its adapter or, if it has none, one of zeros.

    **Arguments:**

    - `lora`: the adapter of the layer, without magnitudes; `None` if it has none.
    """
    first = first_magnitude(layer)
    wanted = jnp.asarray(lengths if first.start.ndim == 2 else lengths[0], first.change.dtype)
    has_adapter = jnp.isfinite(wanted)
    change = jnp.where(has_adapter, wanted - first.first, 0)
    # The lengths of a part without an adapter are its own, up to the rounding of who wrote them.
    if lora is None and np.all(np.abs(change) <= 1e-5 * np.abs(first.first)):
        return layer
    # A row of zeros has no magnitude: any length of it is zero.
    change = jnp.where(jnp.isinf(first.first), 0, change)
    start = Magnitude.of(jnp.where(has_adapter, first.first, jnp.inf), change.dtype).start
    lora = _zeros(layer) if lora is None else lora
    return dataclasses.replace(lora, magnitude=Magnitude(change, start))


def write_lengths(policy: Transformer, found: Mapping[str, LoRA], site: Site) -> Lengths:
    """The lengths of the rows of a layer of the checkpoint, also of its parts without an adapter.

    **Raises:**

    `ValueError` if `policy` lacks a weight that a length depends on.
    """
    nodes = jax.tree_util.tree_leaves_with_path(policy, is_leaf=is_linear)
    plain = {leaf_name(path): node for path, node in nodes if is_linear(node)}
    whole = np.zeros((len(site.layers), site.outputs), np.float32)
    for path, rows in zip(site.paths, site.rows, strict=True):
        if path in found:
            lengths = found[path].lengths()
        elif path in plain:
            lengths = first_magnitude(plain[path]).first
        else:
            lengths = None
        if lengths is None:
            raise ValueError(
                f"`policy` must hold the weight of {path!r}, which a magnitude of the adapters "
                "depends on. Give the whole policy, not its adapters alone."
            )
        whole[:, rows] = np.asarray(lengths)
    return np.where(np.isinf(whole), 0, whole)


def _zeros(layer: Any) -> LoRA:
    *lead, out, width = weight_shape(layer).shape
    dtype = first_magnitude(layer).change.dtype
    return LoRA(layer, jnp.zeros((*lead, 1, width), dtype), jnp.zeros((*lead, out, 1), dtype), 1.0)
