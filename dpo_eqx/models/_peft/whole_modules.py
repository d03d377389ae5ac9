"""Modules that are trained whole (`modules_to_save`) in PEFT's files.

`load.py` reads the adapters beside them, and `save.py` writes them. For modules without names in
PEFT see `adapter_paths.py`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..._jax.dtypes import at_least_float32
from .._adapters.linear_layers import replace_at
from .._adapters.whole_module import WholeModule, can_be_whole, whole_modules
from .._checkpoint.families import FAMILIES
from .._checkpoint.folder import Weights
from .._checkpoint.tensor_names import Source
from .._decoder.blocks import layers_at
from .._decoder.transformer import Transformer
from .checks import PREFIX
from .config import PeftConfig

_PARTS = ("weight", "bias")


def chosen_modules(policy: Transformer, config: PeftConfig) -> dict[str, Any]:
    """The modules of a policy that an adapter's file replaces, by their paths.

    **Raises:**

    `ValueError` if a name matches no module of the policy that can be trained whole, or only some
    layers of a stack, or if the file has an embedding and an unembedding for a policy with one.
    """
    found: dict[str, Any] = {}
    known = whole_modules(policy)
    matched: set[str] = set()
    for path, module in known.items():
        names = _module_names(policy, path)
        by = [{end for end in config.modules if name.endswith(end)} for name in names]
        if any(by) and not all(by):
            raise ValueError(
                f"`modules_to_save` of the adapter must match all layers of {path!r} or none, "
                f"since they are stacked; got {list(config.modules)}. Merge the adapter into its "
                "base with PEFT, and load the result."
            )
        if any(by):
            found[path] = module
            matched |= set().union(*by)
    if policy.config.tied and "embedding" in known and not config.reward:
        head = _source(policy, "head").module
        ends = {end for end in config.modules if head.endswith(end)}
        if (ends or "embedding" in found) and not config.tied:
            raise ValueError(
                f"`modules_to_save` of the adapter, {list(config.modules)}, unties the embedding "
                "and the unembedding, which are one array in `policy`. Train such an adapter with "
                "`ensure_weight_tying=True`, or load a base whose unembedding is a tensor of its "
                "own."
            )
        matched |= ends
    unknown = set(config.modules) - matched
    if unknown:
        names = sorted({name for path in known for name in _module_names(policy, path)[:1]})
        raise ValueError(
            f"`modules_to_save` of the adapter must name modules that can be trained whole; got "
            f"{sorted(unknown)}, and `policy` has {', '.join(names)}. Merge the adapter into its "
            "base with PEFT, and load the result."
        )
    return found


def expected_shapes(policy: Transformer, chosen: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of these modules, by its name in the file."""
    return {
        name: _by_tensor(policy, path, getattr(module, part)).shape[1:]
        for path, module in chosen.items()
        for part, names in _tensor_names(policy, path, module)
        for name in names
    }


def tied_copy(policy: Transformer, chosen: Mapping[str, Any]) -> str | None:
    """The name of the second copy that PEFT writes of an embedding that is the unembedding, too."""
    if not policy.config.tied or "embedding" not in chosen:
        return None
    return PREFIX + _source(policy, "head").tensor(0, "weight")


def read_modules(policy: Transformer, weights: Weights, chosen: Mapping[str, Any]) -> Transformer:
    """The policy with the modules of an adapter's file in place of its own, which are kept."""

    def trained(path: str, module: Any) -> WholeModule:
        whole = WholeModule.of(module)
        arrays = []
        for part, names in _tensor_names(policy, path, module):
            now = getattr(module, part)
            read = np.stack([weights.read(name) for name in names]).reshape(now.shape)
            arrays.append(jnp.asarray(read, at_least_float32(now.dtype)))
        return whole.with_trained(tuple(arrays))

    return replace_at(policy, set(chosen), can_be_whole, trained)


def write_modules(
    policy: Transformer, found: Mapping[str, WholeModule], *, tied: bool
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of modules that are trained whole, and the contents of `modules_to_save`.

    `tied` says whether the embedding is among them and is the unembedding, too.
    """
    tensors: dict[str, np.ndarray] = {}
    ends: list[str] = []
    for path, whole in found.items():
        for part, names in _tensor_names(policy, path, whole.module):
            split = _by_tensor(policy, path, np.asarray(getattr(whole.module, part)))
            tensors |= dict(zip(names, map(np.ascontiguousarray, split), strict=True))
        ends += _ends(policy, path)
    second = tied_copy(policy, found)
    if tied and second is not None:
        tensors[second] = np.ascontiguousarray(found["embedding"].weight)
    return tensors, sorted(ends)


def _tensor_names(policy: Transformer, path: str, module: Any) -> Iterator[tuple[str, list[str]]]:
    """The parameters of a module, in the order of its leaves, and the names of their tensors."""
    source = _source(policy, path)
    heads = range(source.tensors_in_layer(policy.config))
    for part in _PARTS:
        if getattr(module, part, None) is not None:
            layers = _layers(policy, path)
            names = [source.tensor(layer, part, head) for layer in layers for head in heads]
            yield part, [PREFIX + name for name in names]


def _by_tensor(policy: Transformer, path: str, array: Any) -> Any:
    """A parameter with one leading axis: of layers, and of heads if each has its own module."""
    axes = path.startswith("layers.") + (_source(policy, path).experts == "each")
    return array.reshape(-1, *array.shape[axes:])


def _layers(policy: Transformer, path: str) -> tuple[int, ...]:
    return layers_at(path, policy.config) if path.startswith("layers.") else (0,)


def _module_names(policy: Transformer, path: str) -> list[str]:
    """The names that PEFT has for a module, one for each layer."""
    module = _module(_source(policy, path))
    return [module.format(layer) for layer in _layers(policy, path)]


def _source(policy: Transformer, path: str) -> Source:
    return FAMILIES[policy.config.family].names[path]


def _module(source: Source) -> str:
    """The module with one name in a layer: that of all heads, if each has a module of its own."""
    return source.module.rsplit(".", 2)[0] if source.experts == "each" else source.module


def _ends(policy: Transformer, path: str) -> list[str]:
    """What PEFT matches with the ends of names to find this module and no other."""
    names = _module_names(policy, path)
    sources = FAMILIES[policy.config.family].names.values()
    others = {
        source.module.format(layer, 0)
        for source in sources
        for layer in range(policy.config.layers)
    }
    others -= set(names)
    words = _module(_source(policy, path)).rsplit("{}.", 1)[-1].split(".")
    for count in range(1, len(words) + 1):
        end = ".".join(words[-count:])
        if not any(other.endswith(end) for other in others):
            return [end]
    return names
