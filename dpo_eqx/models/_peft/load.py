"""Reads folders of adapters: PEFT's `adapter_config.json` and safetensors, or our own.

`save.py` writes them. `adapter_paths.py` has our own format, for modules that PEFT has no names
for. For PEFT's format, `config.py` interprets the configuration, `checkpoint_layers.py` maps our
layers to the checkpoint's, and `checks.py` rejects what does not fit.
"""

import dataclasses
import os
from collections.abc import Set
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ..._jax.dtypes import at_least_float32
from .._adapters.linear_layers import Policy, is_of_mixture, replace_at, unembedding_of
from .._adapters.lora import check_dropout, check_no_adapters, check_not_of_mixture
from .._adapters.lora_layer import LoRA
from .._adapters.quantize import is_linear, weight_shape
from .._checkpoint.folder import ADAPTER, ADAPTER_CONFIG, Weights, read_json, resolve
from .._checkpoint.language_model import keep_language_model
from .._decoder.reward_model import RewardModel
from .._decoder.transformer import Transformer
from .adapter_paths import is_by_path, read_by_path
from .checkpoint_layers import (
    Pair,
    Site,
    linear_shapes,
    older_sites,
    sites_of,
    split,
    stored_name,
)
from .checks import PREFIX, check_sites, check_tensors, tensor_name
from .config import HEADS, PeftConfig, read_peft
from .magnitudes import Lengths, read_lengths, with_lengths
from .reward_head import take_head, with_head
from .whole_modules import chosen_modules, expected_shapes, read_modules, tied_copy


def load_lora(
    policy: Policy, path: str | os.PathLike[str], *, dropout: float | None = None
) -> Policy | RewardModel:
    """Adds the adapters of a folder, which PEFT or `save_lora` wrote, to the layers of a policy.

    ```python
    policy = models.load_lora(models.load("Qwen/Qwen3-0.6B", quantize="nf4"), "run/adapter")
    ```

    They compute the same as in PEFT, except that an adapter of the unembedding, of experts or of a
    router has no dropout. If only some layers of a stack have an adapter, the others get one with
    $A$ and $B$ zero, which no gradient changes. GPT-2's queries, keys and values are one layer in
    its checkpoints; each gets its own adapter. If an adapter is of a model with images, the
    language model's part is read, and a warning counts the other tensors.

    An adapter of a reward model (the task `SEQ_CLS` in PEFT) holds its head, which is trained
    whole. On a `Transformer` it makes a `RewardModel`.

    Adapters of any other Equinox module, which `save_lora` wrote, are found by the paths of its
    layers and loaded bit for bit. Such a module may already have the same adapters, which are
    replaced.

    **Arguments:**

    - `policy`: the base that the adapter was trained on, quantised or not, without adapters. For
        an adapter of PEFT it must be a `Transformer` or a `RewardModel`.
    - `path`: a folder with `adapter_config.json` and `adapter_model.safetensors`; or a name on
        the Hugging Face hub.
    - `dropout`: as in `add_lora` (default: the `lora_dropout` of the folder).

    **Returns:**

    The policy with adapters, in float32 or wider; a `RewardModel` if the folder has its head.

    **Raises:**

    `ValueError` if

    - the adapter is not LoRA, or has settings that are not supported;
    - its layers or shapes differ from the policy's, or its rank from its configuration;
    - it is stored as a pickle;
    - `dropout` is not in `[0, 1)`;
    - the policy already has adapters.

    `FileNotFoundError` if there is no adapter.
    """
    if dropout is not None:
        check_dropout(dropout)
    folder = resolve(path, (ADAPTER, ADAPTER_CONFIG))
    values = read_json(folder / ADAPTER_CONFIG)
    if is_by_path(values):
        return read_by_path(policy, values, Weights(folder, ADAPTER), dropout)
    if not isinstance(policy, Transformer | RewardModel):
        raise ValueError(
            "`policy` must be a `models.Transformer` or a `models.RewardModel` for an adapter of "
            f"PEFT, which names layers of its checkpoints; got {type(policy).__name__}. For "
            "another Equinox module give a folder that `models.save_lora` wrote."
        )
    check_no_adapters(policy)
    config = read_peft(values)
    config = config if dropout is None else dataclasses.replace(config, dropout=dropout)
    weights = Weights(folder, ADAPTER)
    decoder = policy.body if isinstance(policy, RewardModel) else policy
    head = take_head(weights, decoder.config.width)
    if head is None and isinstance(policy, Transformer):
        return _load_peft(policy, weights, config)
    modules = tuple(name for name in config.modules if name not in HEADS)
    config = dataclasses.replace(config, modules=modules, reward=True)
    model = with_head(policy, head)
    return eqx.tree_at(lambda m: m.body, model, _load_peft(model.body, weights, config))


def _load_peft(policy: Transformer, weights: Weights, config: PeftConfig) -> Transformer:
    config = dataclasses.replace(config, outer=keep_language_model(weights, PREFIX))
    shapes = linear_shapes(policy)
    known = sites_of(policy, shapes)
    own = [*known, *older_sites(policy)]
    sites = [site for site in own if config.names_in(site)]
    check_sites(config, known, sites)
    chosen = chosen_modules(policy, config)
    modules = expected_shapes(policy, chosen)
    second = None if config.reward else tied_copy(policy, chosen)
    if second is not None:
        modules[second] = policy.embedding.weight.shape
    adapted = {name for site in sites for name in config.names_in(site)}
    check_tensors(weights, config, sites, adapted, shapes, policy, modules)
    pairs: dict[str, Pair] = {}
    lengths: dict[str, Lengths] = {}
    for site in sites:
        pairs |= split(site, _read(weights, config, site, adapted))
        if config.dora:
            lengths |= read_lengths(weights, site, adapted)
    unembedding = unembedding_of(policy)

    def with_adapter(path: str, layer: Any) -> Any:
        if config.dora:
            check_not_of_mixture(path, layer)
        lora = _lora(layer, pairs[path]) if path in pairs else None
        if path in lengths:
            lora = with_lengths(layer, lora, lengths[path])
        if not isinstance(lora, LoRA):
            return layer
        # The unembedding is used as a matrix, so it has no input to drop from.
        without = path == unembedding or is_of_mixture(layer)
        dropout = 0.0 if without else config.dropout
        return dataclasses.replace(lora, dropout=dropout, rank_stabilised=config.rank_stabilised)

    adapted_policy = replace_at(policy, {*pairs, *lengths}, is_linear, with_adapter)
    return read_modules(adapted_policy, weights, chosen)


def _read(weights: Weights, config: PeftConfig, site: Site, adapted: Set[str]) -> Pair:
    """The adapters of a site in all layers; zeros for a layer without one.

    `adapted` has the names of all modules and parameters with an adapter.
    """
    names = site.names()
    first = next(name for name in names if name in adapted)

    def stored(name: str, letter: str) -> str:
        return tensor_name(stored_name(name, adapted), letter)

    def stack(letter: str) -> np.ndarray:
        nothing = np.zeros(weights.shapes[stored(first, letter)], np.float32)
        read = [
            _wide(weights.read(stored(name, letter))) if name in adapted else nothing
            for name in names
        ]
        return np.concatenate([site.from_file(letter, x) for x in read])

    return Pair(stack("A"), stack("B"), config.scale_of(first))


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(at_least_float32(x.dtype))


def _lora(layer: Any, pair: Pair) -> LoRA:
    weight = weight_shape(layer)
    dtype, lead = at_least_float32(weight.dtype), weight.shape[:-2]
    down, up = (x.reshape(*lead, *x.shape[1:]) for x in pair[:2])
    return LoRA(layer, jnp.asarray(down, dtype), jnp.asarray(up, dtype), pair.scale)
