"""Reads and writes folders of adapters: PEFT's `adapter_config.json` and safetensors, or our own.

`adapter_paths.py` has our own format, for modules that PEFT has no names for. For PEFT's format,
`config.py` interprets the configuration, `checkpoint_layers.py` maps our layers to the
checkpoint's, and `checks.py` rejects what does not fit.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._extras import require
from ..._jax.dtypes import at_least_float32
from .._adapters.linear_layers import Policy, is_of_mixture, replace_at, unembedding_of
from .._adapters.lora import (
    adapters,
    check_dropout,
    check_no_adapters,
    check_not_of_mixture,
    modules_of,
)
from .._adapters.lora_layer import LoRA
from .._adapters.quantize import is_linear, weight_shape
from .._adapters.whole_module import WholeModule
from .._checkpoint.families import FAMILIES
from .._checkpoint.folder import ADAPTER, ADAPTER_CONFIG, Weights, read_json, resolve
from .._checkpoint.language_model import keep_language_model, outer_name
from .._decoder.reward_model import RewardModel
from .._decoder.transformer import Transformer
from .adapter_paths import is_by_path, read_by_path, write_by_path
from .checkpoint_layers import (
    Pair,
    Site,
    join,
    linear_shapes,
    older_sites,
    short_name,
    sites_of,
    split,
    stored_name,
)
from .checks import PREFIX, check_sites, check_tensors, magnitude_name, tensor_name
from .config import HEADS, PeftConfig, read_peft, write_peft
from .magnitudes import Lengths, read_lengths, with_lengths, write_lengths
from .reward_head import has_names, head_tensor, take_head, with_head
from .whole_modules import (
    chosen_modules,
    expected_shapes,
    read_modules,
    tied_copy,
    write_modules,
)


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


def save_lora(policy: PyTree, path: str | os.PathLike[str], *, base: str | None = None) -> None:
    """Writes only the adapters of a policy, as a folder that PEFT, vLLM and `load_lora` load.

    ```python
    models.save_lora(policy, "adapter", base="Qwen/Qwen3-0.6B")
    ```

    The file is exactly equivalent to the policy's adapters. GPT-2's queries, keys and values are
    one layer in its checkpoints: if their adapters do not share $A$, that layer's adapter has the
    sum of their ranks. If the policy is the language model of a checkpoint with images, the adapter
    is one of that whole checkpoint.

    A reward model's head is written whole, whether it was trained or not.

    PEFT has names only for the layers of a `Transformer` and of a `RewardModel`. The adapters of
    any other Equinox module are written by the paths of their layers, such as `"mlp.layers.0"`, for
    `load_lora`.

    **Arguments:**

    - `policy`: a policy with adapters, on any base, quantised or not.
    - `path`: the folder, created if it does not exist; other files in it stay.
    - `base`: the name or folder of the base model, for PEFT to find it.

    **Raises:**

    `ValueError` if the policy has no adapters, or two adapters with one path.
    """
    if not adapters(policy):
        raise ValueError("`policy` has no adapters to save; add them with `add_lora`.")
    body = policy.body if has_names(policy) else policy
    by_path, whole = adapters(body), modules_of(body)
    if (
        isinstance(body, Transformer)
        and by_path.keys() <= FAMILIES[body.config.family].names.keys()
    ):
        tensors, config = _in_peft(body, by_path, whole, base, reward=body is not policy)
        tensors |= head_tensor(policy) if body is not policy else {}
    else:
        tensors, config = write_by_path(adapters(policy), modules_of(policy), base)
    _write(Path(path), tensors, config)


def _in_peft(
    policy: Transformer,
    found: Mapping[str, LoRA],
    whole: Mapping[str, WholeModule],
    base: str | None,
    *,
    reward: bool,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the contents of `adapter_config.json`, in PEFT's format.

    `reward` says whether the policy is the body of a reward model, whose head is left out here.
    """
    pairs = {name: _pair(lora) for name, lora in found.items()}
    tied = not reward and tied_copy(policy, whole) is not None
    tensors, modules = write_modules(policy, whole, tied=tied)
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    sites, is_inner = sites_of(policy, pairs), policy.origin.outer is not None
    dora = any(lora.magnitude is not None for lora in found.values())
    parameters: set[str] = set()
    joined = {site.pattern: join(site, pairs) for site in sites}
    live = {name for site in sites for name in _live(site, joined[site.pattern])}
    for site in sites:
        pair = joined[site.pattern]
        lengths = write_lengths(policy, found, site) if dora else None
        names = site.names()
        in_all_layers = live.issuperset(names)
        downs, ups = (x.reshape(len(names), -1, *x.shape[1:]) for x in pair[:2])
        for layer, name in enumerate(names):
            if name in live:
                module = stored_name(name, live)
                for letter, x in zip("AB", site.to_file(downs[layer], ups[layer]), strict=True):
                    tensors[tensor_name(module, letter)] = np.ascontiguousarray(x)
                if lengths is not None:
                    tensors[magnitude_name(name)] = np.ascontiguousarray(lengths[layer])
                if is_inner:
                    # A short name could be one of another part, such as a vision tower.
                    name = outer_name(name)
                elif in_all_layers:
                    name = short_name(policy, site)
                ranks[name], scales[name] = pair.down.shape[1], pair.scale
                parameters |= {name} if site.parameter else set()
    transposed = any(site.transposed for site in sites)
    config = write_peft(
        ranks,
        scales,
        parameters=parameters,
        # PEFT has one form of scales, and one dropout, for all adapters. The scales are exact in
        # either form. An adapter of the unembedding has no dropout beside others with dropout, and
        # beside adapters of parameters PEFT refuses it.
        rank_stabilised=all(lora.rank_stabilised for lora in found.values()),
        dropout=0.0 if parameters else max(lora.dropout for lora in found.values()),
        dora=dora,
        modules=modules,
        tied=tied,
        transposed=transposed,
        base=base,
        reward=reward,
    )
    if is_inner:
        tensors = {PREFIX + outer_name(k.removeprefix(PREFIX)): x for k, x in tensors.items()}
    return tensors, config


def _live(site: Site, pair: Pair) -> list[str]:
    """The names of a site of which a file has adapters.

    Adapters of zeros stand for layers that had none, unless all are zero.
    """
    names = site.names()
    parts = (x.reshape(len(names), -1) for x in pair[:2])
    live = [bool(down.any() or up.any()) for down, up in zip(*parts, strict=True)]
    return [name for name, is_live in zip(names, live, strict=True) if is_live or not any(live)]


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


def _pair(lora: LoRA) -> Pair:
    down, up = (np.asarray(x).reshape(-1, *x.shape[-2:]) for x in (lora.down, lora.up))
    return Pair(down, up, lora.scale)


def _write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Writes both files completely before either replaces an old one."""
    safetensors = require("safetensors.numpy", extra="models")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as name:
        fresh = Path(name)
        safetensors.save_file(tensors, fresh / ADAPTER, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (fresh / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        for file in (ADAPTER, ADAPTER_CONFIG):
            os.replace(fresh / file, folder / file)
