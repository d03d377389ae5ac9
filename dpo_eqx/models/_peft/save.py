"""Writes folders of adapters: PEFT's `adapter_config.json` and safetensors, or our own.

`load.py` reads them, and says which file has what of their formats.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from ..._extras import require
from .._adapters.lora import adapters, modules_of
from .._adapters.lora_layer import LoRA
from .._adapters.whole_module import WholeModule
from .._checkpoint.families import FAMILIES
from .._checkpoint.folder import ADAPTER, ADAPTER_CONFIG
from .._checkpoint.language_model import outer_name
from .._decoder.transformer import Transformer
from .adapter_paths import write_by_path
from .checkpoint_layers import Pair, Site, join, short_name, sites_of, stored_name
from .checks import PREFIX, magnitude_name, tensor_name
from .config import write_peft
from .magnitudes import write_lengths
from .reward_head import has_names, head_tensor
from .whole_modules import tied_copy, write_modules


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
