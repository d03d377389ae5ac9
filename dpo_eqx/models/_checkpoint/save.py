"""Writes a `Transformer` as a folder that `transformers` loads, with its tokenizer's files.

`tensor_names.py` holds the names of the tensors. `replace_folder.py` moves the finished folder to
its place.
"""

import functools
import itertools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from ..._extras import require
from ..._jax.paths import leaf_name
from .._adapters.quantize import holds_quantized
from .._decoder.blocks import layers_at
from .._decoder.reward_model import RewardModel
from .._decoder.transformer import Transformer
from .config_json import write_config
from .families import FAMILIES
from .folder import CONFIG, INDEX, TEMPLATES, WEIGHTS, read_carried, resolve
from .replace_folder import replacing
from .reward_head import TENSOR, reward_keys
from .tensor_names import Source, rows_of_parts, source_of

GENERATION = "generation_config.json"


def save(
    policy: PyTree,
    path: str | os.PathLike[str],
    *,
    max_shard_size: int = 5_000_000_000,
    tokenizer_from: str | os.PathLike[str] | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes a policy as a folder that `models.load`, `transformers` and vLLM load.

    The folder appears complete or not at all. Other files in an existing folder stay. The
    tokenizer's files come from the folder that the policy was loaded from. If that checkpoint held
    more than a language model, a warning says that the language model is saved alone.

    ```python
    models.save(policy, "trained")
    ```

    **Arguments:**

    - `policy`: a `Transformer` or a `RewardModel`, in the dtype to be written. Merge its adapters
        first.
    - `path`: the folder, created if it does not exist.
    - `max_shard_size`: the largest size of a file, in bytes. Larger weights are split into several
        files with an index.
    - `tokenizer_from`: a folder or hub name to take the tokenizer's files from instead. The
        generation settings stay those of the policy.
    - `chat_template`: the text of a chat template to write in place of the tokenizer's.

    **Raises:**

    `ValueError` if `policy` is neither a `Transformer` nor a `RewardModel`, has quantised layers or
    adapters, or has a configuration that its family's checkpoints cannot store; or if it is a
    reward model of a family for which `transformers` has none.
    """
    body = policy.body if isinstance(policy, RewardModel) else policy
    if not isinstance(body, Transformer):
        raise ValueError(
            "`policy` must be a `models.Transformer` or a `models.RewardModel`, since checkpoints "
            f"hold no other module; got {type(policy).__name__}. Write another Equinox module with "
            "`eqx.tree_serialise_leaves` or orbax, and adapters alone with `models.save_lora`."
        )
    if holds_quantized(policy):
        raise ValueError(
            "`policy` must be plain to be saved; it has quantised layers. Decode and merge them "
            "first with `models.merge_lora`, or write only its adapters with `models.save_lora`."
        )
    tensors = tensors_of(body)
    # Keys that the family reads are written anew, since their old values may be out of date.
    read = FAMILIES[body.config.family].reads()
    config = {
        **{key: value for key, value in body.origin.config.items() if key not in read},
        **write_config(body.config),
        **_dtype_keys(body.embedding.weight.dtype),
    }
    if isinstance(policy, RewardModel):
        tensors.append(
            Tensor(TENSOR, policy.head.weight.nbytes, lambda: np.asarray(policy.head.weight))
        )
        config |= reward_keys(body.config.family, body.origin.config)
    files = _companions(body, tokenizer_from)
    files = files if chat_template is None else _with_template(files, chat_template)
    if body.origin.outer is not None:
        warnings.warn(
            f"The policy is the language model of a {body.origin.outer!r} checkpoint. It is "
            f"saved alone, as {config['architectures'][0]}, without the other parts.",
            stacklevel=2,
        )
    with replacing(Path(path)) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        _write_json(folder / CONFIG, config)
        _write_weights(folder, tensors, max_shard_size)


def _companions(
    policy: Transformer, tokenizer_from: str | os.PathLike[str] | None
) -> Mapping[str, bytes]:
    """The tokenizer's files, perhaps those of another one, and the policy's generation settings."""
    own = policy.origin.files
    if tokenizer_from is None:
        return own
    others = read_carried(resolve(tokenizer_from))
    files = {name: content for name, content in others.items() if name != GENERATION}
    return files | {name: own[name] for name in (GENERATION,) if name in own}


def _with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    # `transformers` takes this file before the template in `tokenizer_config.json`, but named
    # templates before both.
    others = {n: content for n, content in files.items() if not n.startswith(f"{TEMPLATES}/")}
    return others | {"chat_template.jinja": template.encode()}


class Tensor(NamedTuple):
    """One tensor to be written: its name, its size in bytes, and a function that reads it."""

    name: str
    size: int
    read: Callable[[], np.ndarray]


def tensors_of(policy: Transformer) -> list[Tensor]:
    """All tensors of the checkpoint, in the order of the layers, without copying their contents."""
    family = FAMILIES[policy.config.family]
    names = family.names
    parts: dict[tuple[str, str], list[tuple[Source, str, Any]]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(policy):
        path = leaf_name(keys)
        if path.rsplit(".", 1)[0] not in names:
            raise ValueError(
                f"`policy` must be plain to be saved; the family {policy.config.family!r} has no "
                f"place for {path!r}. Merge adapters first, with `models.merge_lora`."
            )
        source, suffix = source_of(names, path)
        parts.setdefault((source.module, suffix), []).append((source, path, leaf))
    tensors = []
    for (_, suffix), pieces in parts.items():
        pieces.sort(key=lambda part: part[0].part)
        source, path, _ = pieces[0]
        leaves = [leaf for _, _, leaf in pieces]
        layers = layers_at(path, policy.config) if path.startswith("layers.") else (None,)
        blocks = source.block_count(policy.config)
        count = source.tensors_in_layer(policy.config)
        size = sum(leaf.nbytes for leaf in leaves) // (len(layers) * count)
        for (place, layer), expert in itertools.product(enumerate(layers), range(count)):
            own = None if layer is None else place
            read = functools.partial(_read, source, blocks, leaves, own, expert)
            tensors.append(Tensor(source.tensor(layer or 0, suffix, expert), size, read))
    dtype = policy.embedding.weight.dtype
    for name, value in family.constants_of(policy.config).items():
        tensors.append(Tensor(name, dtype.itemsize, functools.partial(np.asarray, value, dtype)))
    return tensors


def _read(
    source: Source, blocks: int, leaves: list[Any], place: int | None, expert: int
) -> np.ndarray:
    """A tensor of one layer, and of one expert if each has its own."""
    index = () if place is None else (place,)
    if source.experts == "stacked":
        parts = zip(*(np.asarray(leaf[index]) for leaf in leaves), strict=True)
        tensor = np.stack([_joined(source, blocks, list(part)) for part in parts])
    else:
        index = index if source.experts is None else (*index, expert)
        tensor = _joined(source, blocks, [np.asarray(leaf[index]) for leaf in leaves])
    # safetensors writes the memory as it lies.
    return np.ascontiguousarray(tensor)


def _joined(source: Source, blocks: int, arrays: list[np.ndarray]) -> np.ndarray:
    return source.transpose(arrays[0] if len(arrays) == 1 else fuse(arrays, blocks))


def fuse(parts: list[np.ndarray], blocks: int) -> np.ndarray:
    """The weight or bias of a fused module, from those of its parts."""
    sizes = [len(part) for part in parts]
    whole = np.empty((sum(sizes), *parts[0].shape[1:]), parts[0].dtype)
    for rows, part in zip(rows_of_parts(sizes, blocks), parts, strict=True):
        whole[rows] = part
    return whole


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
    """Tensors in runs of at most `limit` bytes each; a larger tensor is a run of its own."""
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
    # `transformers` refuses files without the metadata `format: "pt"`.
    safetensors.save_file(arrays, file, metadata={"format": "pt"})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _dtype_keys(dtype: Any) -> dict[str, str]:
    # `transformers` before 4.56 and vLLM read `torch_dtype`.
    return {"dtype": str(dtype), "torch_dtype": str(dtype)}
