"""A `Transformer` written as the folder that `transformers` loads, its tokenizer's files with it.

The names of the tensors are in `tensor_names.py`; how a finished folder takes its place is in
`replace_folder.py`.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from ..._extras import require
from ..._jax.paths import leaf_name
from .._adapters.quantize import holds_quantized
from .._decoder.transformer import Transformer
from .config_json import write_config
from .families import FAMILIES
from .folder import CONFIG, INDEX, WEIGHTS, read_carried, resolve
from .replace_folder import replacing
from .tensor_names import Source, source_of


def save(
    policy: PyTree,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int = 5_000_000_000,
    tokenizer_from: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a policy as a folder that `models.load`, `transformers` and vLLM load.

    The folder appears whole or not at all; what it holds beside a checkpoint's files stays. The
    tokenizer's files are those of the folder that the policy was loaded from.

    ```python
    models.save(policy, "trained")
    ```

    **Arguments:**

    - `policy`: a `Transformer`, in the dtype that the files are to have. Adapters must be merged
        into it before.
    - `path`: the folder, made where it does not exist.
    - `max_shard_size`: weights above it, in bytes, go into several files and an index.
    - `tokenizer_from`: a folder or hub name whose tokenizer's files to write instead.

    **Raises:**

    `ValueError` if `policy` is no `Transformer`, has parameters that its family's checkpoints have
    not, such as adapters, or quantised layers, or a configuration that they cannot say.
    """
    if not isinstance(policy, Transformer):
        raise ValueError(
            "`policy` must be a `models.Transformer`, which alone has the form of a checkpoint; "
            f"got {type(policy).__name__}. Write another Equinox module with "
            "`eqx.tree_serialise_leaves` or orbax, and adapters alone with `models.save_lora`."
        )
    if holds_quantized(policy):
        raise ValueError(
            "`policy` must be plain to be saved; it has quantised layers. Decode and merge them "
            "before, with `models.merge_lora`, or write its adapters alone, with "
            "`models.save_lora`."
        )
    tensors = tensors_of(policy)
    # What the family reads is written anew: an old key could say what no longer holds.
    read = FAMILIES[policy.config.family].reads()
    config = {
        **{key: value for key, value in policy.origin.config.items() if key not in read},
        **write_config(policy.config),
        **_dtype_keys(policy.embedding.weight.dtype),
    }
    files = policy.origin.files if tokenizer_from is None else read_carried(resolve(tokenizer_from))
    with replacing(Path(path)) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        _write_json(folder / CONFIG, config)
        _write_weights(folder, tensors, max_shard_size)


class Tensor(NamedTuple):
    """One tensor to be written: its name, its size in bytes, and how to get it."""

    name: str
    size: int
    read: Callable[[], np.ndarray]


def tensors_of(policy: Transformer) -> list[Tensor]:
    """All tensors of the checkpoint, in the order of the layers; nothing is copied yet."""
    names = FAMILIES[policy.config.family].names
    parts: dict[tuple[str, str], list[tuple[Source, str, Any]]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(policy):
        path = leaf_name(keys)
        if path.rsplit(".", 1)[0] not in names:
            raise ValueError(
                f"`policy` must be plain to be saved; the family {policy.config.family!r} has no "
                f"place for {path!r}. Merge adapters before, with `models.merge_lora`."
            )
        source, suffix = source_of(names, path)
        parts.setdefault((source.module, suffix), []).append((source, path, leaf))
    tensors = []
    for (_, suffix), found in parts.items():
        found.sort(key=lambda part: part[0].part)
        source, path, _ = found[0]
        leaves = [leaf for _, _, leaf in found]
        layers = range(policy.config.layers) if path.startswith("layers.") else (None,)
        for layer in layers:
            read = functools.partial(_read, source, leaves, layer)
            size = sum(leaf.nbytes for leaf in leaves) // len(layers)
            tensors.append(Tensor(source.tensor(layer or 0, suffix), size, read))
    return tensors


def _read(source: Source, leaves: list[Any], layer: int | None) -> np.ndarray:
    arrays = [np.asarray(leaf if layer is None else leaf[layer]) for leaf in leaves]
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return np.ascontiguousarray(whole.T if source.transposed else whole)


def _write_weights(folder: Path, tensors: list[Tensor], limit: int) -> None:
    shards = shard(tensors, limit)
    if len(shards) == 1:
        return _write_shard(folder / WEIGHTS, tensors)
    places = {}
    for number, held in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, held)
        places |= {tensor.name: file for tensor in held}
    size = sum(tensor.size for tensor in tensors)
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    return None


def shard(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    """Tensors in runs of at most `limit` bytes each, or of one tensor where it alone is larger."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    return shards


def _write_shard(file: Path, tensors: list[Tensor]) -> None:
    safetensors = require("safetensors.numpy", extra="models")
    arrays = {tensor.name: tensor.read() for tensor in tensors}
    # `transformers` refuses files that do not say who may read them.
    safetensors.save_file(arrays, file, metadata={"format": "pt"})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _dtype_keys(dtype: Any) -> dict[str, str]:
    # The second is what `transformers` before 4.56 and vLLM read.
    return {"dtype": str(dtype), "torch_dtype": str(dtype)}
