"""Adapters read and written as folders: PEFT's `adapter_config.json` and safetensors, or our own.

Our own is for modules that PEFT has no names for; it is in `adapter_paths.py`. What PEFT's
configuration means is in `config.py`; which of our layers are which of the checkpoint's,
and what becomes of three layers that are one there, in `checkpoint_layers.py`; what is refused in
`checks.py`.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._extras import require
from ..._jax.dtypes import at_least_float32
from ..._jax.paths import leaf_name
from .._adapters.linear_layers import Policy, replace_at
from .._adapters.lora import LoRA, adapters, check_no_adapters, is_linear, weight_shape
from .._checkpoint.families import FAMILIES
from .._checkpoint.folder import ADAPTER, ADAPTER_CONFIG, Weights, read_json, resolve
from .._decoder.transformer import Transformer
from .adapter_paths import is_by_path, read_by_path, write_by_path
from .checkpoint_layers import Pair, Site, join, short_names, sites_of, split
from .checks import check_sites, check_tensors, tensor_name
from .config import PeftConfig, read_peft, write_peft


def load_lora(policy: Policy, path: str | os.PathLike[str]) -> Policy:
    """Puts the adapters beside the layers of a policy that PEFT, or `save_lora`, has written.

    ```python
    policy = models.load_lora(models.load("Qwen/Qwen3-0.6B", quantize="nf4"), "run/adapter")
    ```

    They compute what they do in PEFT, but for `lora_dropout`, which is not applied. A layer of the
    stack that has no adapter gets one of zeros, $A$ and $B$, which no gradient moves. GPT-2's
    queries, keys and values, one layer in its checkpoints, get an adapter each.

    Adapters that `save_lora` has written of any other Equinox module are found by the paths of its
    layers, and come back bit by bit. Such a module may have the same adapters already, whose place
    they take.

    **Arguments:**

    - `policy`: the base that the adapter is for, quantised or not, without adapters; for an adapter
        of PEFT, a `Transformer`.
    - `path`: a folder with `adapter_config.json` and `adapter_model.safetensors`; or a name on
        the Hugging Face hub.

    **Returns:**

    The policy with adapters, in float32 or wider.

    **Raises:**

    `ValueError` where the adapter is of another kind than LoRA or asks for what is not built, is
    for other layers or shapes than the policy's, or has another rank than its configuration says;
    where it is a pickle, and where the policy has adapters already. `FileNotFoundError` where
    there is none.
    """
    folder = resolve(path, (ADAPTER, ADAPTER_CONFIG))
    values = read_json(folder / ADAPTER_CONFIG)
    if is_by_path(values):
        return read_by_path(policy, values, Weights(folder, ADAPTER))
    if not isinstance(policy, Transformer):
        raise ValueError(
            "`policy` must be a `models.Transformer` for an adapter of PEFT, which names layers of "
            f"its checkpoints; got {type(policy).__name__}. For another Equinox module give the "
            "folder that `models.save_lora` has written of it."
        )
    return _load_peft(policy, folder, read_peft(values))


def _load_peft(policy: Transformer, folder: Path, config: PeftConfig) -> Transformer:
    check_no_adapters(policy)
    weights = Weights(folder, ADAPTER)
    shapes = _linear_shapes(policy)
    sites = [site for site in sites_of(policy, shapes) if any(map(config.has, site.names()))]
    check_sites(config, sites_of(policy, shapes), sites)
    check_tensors(weights, config, sites, shapes, policy)
    pairs: dict[str, Pair] = {}
    for site in sites:
        pairs |= split(site, _read(weights, config, site))
    return replace_at(
        policy, set(pairs), is_linear, lambda path, layer: _lora(layer, path, pairs[path])
    )


def save_lora(policy: PyTree, path: str | os.PathLike[str], *, base: str | None = None) -> None:
    """Writes the adapters of a policy, alone, as a folder that PEFT, vLLM and `load_lora` load.

    ```python
    models.save_lora(policy, "adapter", base="Qwen/Qwen3-0.6B")
    ```

    They are exactly those of the policy. Where GPT-2's queries, keys and values have adapters of
    their own, that of the layer which they are in its checkpoints has the sum of their ranks.

    PEFT has names for the layers of a `Transformer` alone. The adapters of any other Equinox module
    are written by the paths of their layers, such as `"mlp.layers.0"`, for `load_lora`.

    **Arguments:**

    - `policy`: with adapters, on a base of whatever form.
    - `path`: the folder, made where it does not exist; other files in it stay.
    - `base`: the name or folder of the base model, for PEFT to find it.

    **Raises:**

    `ValueError` where the policy has no adapters, or two of one path.
    """
    found = adapters(policy)
    if not found:
        raise ValueError("`policy` has no adapters to save; add them with `add_lora`.")
    if (
        isinstance(policy, Transformer)
        and found.keys() <= FAMILIES[policy.config.family].names.keys()
    ):
        tensors, config = _in_peft(policy, found, base)
    else:
        tensors, config = write_by_path(found, base)
    _write(Path(path), tensors, config)


def _in_peft(
    policy: Transformer, found: Mapping[str, LoRA], base: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors, and the contents of the `adapter_config.json`, as PEFT has them."""
    pairs = {name: _pair(lora) for name, lora in found.items()}
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    sites = sites_of(policy, pairs)
    for site in sites:
        pair = join(site, pairs)
        live = [bool(down.any() or up.any()) for down, up in zip(*pair[:2], strict=True)]
        whole = all(live) or not any(live)
        for layer, name in enumerate(site.names()):
            if whole or live[layer]:
                tensors[tensor_name(name, "A")] = np.ascontiguousarray(pair.down[layer])
                tensors[tensor_name(name, "B")] = np.ascontiguousarray(pair.up[layer])
                name = short_names(policy)[site.module] if whole else name
                ranks[name], scales[name] = pair.down.shape[1], pair.scale
    transposed = any(site.transposed for site in sites)
    return tensors, write_peft(ranks, scales, transposed=transposed, base=base)


def _linear_shapes(policy: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of the weight of each linear layer, by the layer's path."""
    nodes = jax.tree_util.tree_leaves_with_path(policy, is_leaf=is_linear)
    return {leaf_name(path): weight_shape(node) for path, node in nodes if is_linear(node)}


def _read(weights: Weights, config: PeftConfig, site: Site) -> Pair:
    """The adapters of a site in all layers, zero where a layer has none."""
    names = site.names()
    has = [config.has(name) for name in names]
    first = names[has.index(True)]

    def stack(letter: str) -> np.ndarray:
        nothing = np.zeros(weights.shapes[tensor_name(first, letter)], np.float32)
        return np.stack(
            [
                _wide(weights.read(tensor_name(name, letter))) if there else nothing
                for name, there in zip(names, has, strict=True)
            ]
        )

    return Pair(stack("A"), stack("B"), config.scale_of(first))


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(at_least_float32(x.dtype))


def _lora(layer: Any, path: str, pair: Pair) -> LoRA:
    dtype = at_least_float32(weight_shape(layer).dtype)
    down, up = (x if path.startswith("layers.") else x[0] for x in pair[:2])
    return LoRA(layer, jnp.asarray(down, dtype), jnp.asarray(up, dtype), pair.scale)


def _pair(lora: LoRA) -> Pair:
    down, up = np.asarray(lora.down), np.asarray(lora.up)
    return Pair(down, up, lora.scale) if down.ndim == 3 else Pair(down[None], up[None], lora.scale)


def _write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Both files complete before either takes its place."""
    safetensors = require("safetensors.numpy", extra="models")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as name:
        fresh = Path(name)
        safetensors.save_file(tensors, fresh / ADAPTER, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (fresh / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        for file in (ADAPTER, ADAPTER_CONFIG):
            os.replace(fresh / file, folder / file)
