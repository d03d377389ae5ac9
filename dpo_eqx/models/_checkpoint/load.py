"""Reads a Hugging Face checkpoint into a `Transformer`, each tensor directly to its devices.

All checks come before the first tensor is read, so that nothing is ever half loaded.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from ..._jax.paths import leaf_name
from .._adapters.formats import FORMATS, Int8Weight, NF4Weight
from .._adapters.linear_layers import is_plain_linear, linear_paths, replace_at
from .._adapters.quantize import Quantized, check_format
from .._decoder.config import Config
from .._decoder.reward_model import RewardModel, without_head
from .._decoder.transformer import Transformer
from .checks import check_tensors, check_tokenizer, with_tying_of
from .config_json import read_config
from .families import FAMILIES
from .fill_shards import fill, fill_encoded, leaf_dtype
from .folder import CONFIG, Weights, read_origin, resolve
from .language_model import inner_origin, is_outer, keep_language_model, leave_out_heads
from .reward_head import PATH, is_reward_model, take_head
from .tensor_sources import LeafSource, sources_in

Sharding = jax.sharding.Sharding


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding] | None = None,
    quantize: str | None = None,
    dropout: bool = True,
    remat: bool = False,
    unroll: bool = False,
    fused: bool = True,
) -> Any:
    """Reads a Hugging Face checkpoint of one of the families that docs/models.md lists.

    ```python
    policy = models.load("Qwen/Qwen3-0.6B", dtype=jnp.bfloat16)
    ```

    Tensors are read one at a time: peak memory is one copy of the weights (quantised, if
    `quantize` is given) and one tensor. The policy carries the tokenizer's files, and
    `models.save` writes them again. If a checkpoint holds more than a language model (Gemma 3,
    Mistral 3 and Qwen3.5 with images), the language model is read, and a warning counts the other
    tensors.

    **Arguments:**

    - `path`: a folder with `config.json` and safetensors, in one file or several with an index; or
        a name on the Hugging Face hub.
    - `dtype`: the dtype of all parameters; by default each keeps its dtype in the file, mostly
        bfloat16. To train a bfloat16 checkpoint, load it in float32 and give the step
        `compute_dtype=jnp.bfloat16`, or wrap the optimiser in `dpx.master_weights`: small updates
        are rounded away otherwise.
    - `sharding`: one sharding for all parameters, or a function of a leaf's path
        (`"layers.attention.query.weight"`) and of its shape and dtype, such as
        `lambda path, leaf: NamedSharding(mesh, spec)`. Each device reads only its own shard. If a
        layer is quantised, its leaves are `"layers.attention.query.stored.codes"` and
        `".stored.scales"`, and each device reads the whole tensor of one layer at a time.
    - `quantize`: `"int8"` or `"nf4"` quantises every linear layer but the unembedding, and experts,
        as `models.quantize` does.
    - `dropout`: whether the dropout of `config.json` applies if the policy is called with a key. If
        not, a key only serves the dropout of adapters.
    - `remat`: whether each layer is recomputed in the backward pass rather than stored.
    - `unroll`: whether the program of a whole row has the code of every layer, rather than a loop
        over the layers. It compiles longer, and on a GPU a step is faster.
    - `fused`: whether attention uses a kernel of the GPU or the TPU, if there is one that fits.

    **Returns:**

    A `Transformer`; or a `RewardModel`, if the checkpoint is a `*ForSequenceClassification` with
    one label.

    **Raises:**

    `ValueError` if

    - the family or format is unknown;
    - a tensor is missing, extra or mis-shaped;
    - a file is truncated or a pickle;
    - the vocabulary is smaller than the tokenizer's;
    - the configuration is not supported, has values of the wrong type, or has keys that are not
      read and may change the logits.

    `FileNotFoundError` if there is no checkpoint.
    """
    if quantize is not None:
        check_format("quantize", quantize)
    folder = resolve(path)
    whole = read_origin(folder)
    origin = inner_origin(whole)
    config = _read_config(origin.config, folder)
    how_it_runs = {"dropout": dropout, "remat": remat, "unroll": unroll, "fused": fused}
    config = dataclasses.replace(config, **how_it_runs)
    check_tokenizer(origin, config.vocab)
    weights = Weights(folder)
    if is_outer(whole.config):
        keep_language_model(weights)
    if (heads := FAMILIES[config.family].heads) is not None:
        leave_out_heads(weights, heads)
    is_reward = is_reward_model(whole.config)
    stored, read_head = take_head(weights) if is_reward else ("", None)
    if is_reward:
        config = without_head(config)
    config = with_tying_of(weights, config)
    # The skeleton has shapes but no arrays, so that the checks need no memory for parameters.
    make = functools.partial(Transformer, config, origin=origin)
    skeleton = eqx.filter_eval_shape(make, key=jax.random.key(0))
    sources = sources_in(weights, skeleton)
    check_tensors(weights, sources, config)

    quantised = set() if quantize is None else linear_paths(skeleton, r"^layers\.", is_plain_linear)

    def read(path, leaf):
        name = leaf_name(path)
        source = sources[name]
        kind = leaf_dtype(dtype, [weights.dtypes[tensor] for tensor in source.tensors])
        leaf = jax.ShapeDtypeStruct(leaf.shape, kind)
        if quantize is not None and name.removesuffix(".weight") in quantised:
            layer = name.removesuffix("weight")
            return _read_encoded(leaf, sharding, layer, source, weights, FORMATS[quantize])
        place = _place(sharding, name, leaf)
        return fill(leaf, place, source.stacked, functools.partial(source.read, weights))

    policy = jax.tree_util.tree_map_with_path(read, skeleton)
    policy = replace_at(policy, quantised, is_plain_linear, lambda _, layer: Quantized.of(layer))
    if read_head is None:
        return policy
    head = jax.ShapeDtypeStruct((1, config.width), leaf_dtype(dtype, [stored]))
    weight = fill(head, _place(sharding, PATH, head), False, read_head)
    model = RewardModel(policy, key=jax.random.key(0))
    return eqx.tree_at(lambda model: model.head.weight, model, weight)


def _read_config(values: Mapping[str, Any], folder: Path) -> Config:
    """The configuration of a folder; errors name the file."""
    try:
        return read_config(values)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} cannot be read. {error}") from None


def _read_encoded(
    leaf: jax.ShapeDtypeStruct,
    sharding: Any,
    layer: str,
    source: LeafSource,
    weights: Weights,
    form: type[Int8Weight] | type[NF4Weight],
) -> Int8Weight | NF4Weight:
    """A stack of weights in `form`; `layer` is the path of the stacked layer and a dot."""
    like = eqx.filter_eval_shape(form.encode, leaf)
    places = [
        _place(sharding, f"{layer}stored.{leaf_name(path)}", part)
        for path, part in jax.tree_util.tree_leaves_with_path(like)
    ]
    full_index = tuple((0, size) for size in source.shape)

    def read(number: int):
        return source.read(weights, number, full_index).astype(leaf.dtype, copy=False)

    return fill_encoded(like, places, read, form.encode)


def _place(sharding: Any, path: str, leaf: jax.ShapeDtypeStruct) -> Sharding | None:
    if sharding is None or isinstance(sharding, Sharding):
        return sharding
    return sharding(path, leaf)
