"""A Hugging Face checkpoint read into a `Transformer`, each tensor straight to its place.

Everything is checked before the first tensor is read, so that nothing is ever half loaded.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from .checks import check_tensors, check_tokenizer
from .folder import CONFIG, Weights, read_json, read_origin, resolve
from .hf import read_config
from .paths import leaf_name
from .placing import fill, leaf_dtype
from .sources import sources_in
from .transformer import Transformer

Sharding = jax.sharding.Sharding


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding] | None = None,
    remat: bool = False,
) -> Transformer:
    """Reads a Hugging Face checkpoint: llama, mistral, qwen2, qwen3, gpt2, phi or gemma2.

    ```python
    policy = models.load("Qwen/Qwen3-0.6B", dtype=jnp.bfloat16)
    ```

    Tensors are read one at a time: peak memory is one copy of the weights and one tensor. The
    tokenizer's files are kept beside the policy, and `models.save` writes them again.

    **Arguments:**

    - `path`: a folder with `config.json` and safetensors, in one file or several with an index; or
        a name on the Hugging Face hub.
    - `dtype`: of all parameters; by default each keeps that of the file.
    - `sharding`: where the parameters go: one sharding for all, or a function of a leaf's path
        (`"layers.attention.query.weight"`) and of its shape and dtype, such as
        `lambda path, leaf: NamedSharding(mesh, spec)`. Each device reads its own part only.
    - `remat`: whether each layer is recomputed in the backward pass rather than stored.

    **Returns:**

    The policy.

    **Raises:**

    `ValueError` on an unknown family, a missing, extra or mis-shaped tensor, a truncated file, a
    pickle, a vocabulary smaller than the tokenizer's, or a configuration that is not built.
    `FileNotFoundError` where there is no checkpoint.
    """
    folder = resolve(path)
    config = dataclasses.replace(read_config(read_json(folder / CONFIG)), remat=remat)
    origin = read_origin(folder)
    check_tokenizer(origin, config.vocab)
    make = functools.partial(Transformer, config, origin=origin)
    skeleton = eqx.filter_eval_shape(make, key=jax.random.key(0))
    weights = Weights(folder)
    sources = sources_in(weights, skeleton)
    check_tensors(weights, sources, config.tied)

    def read(path, leaf):
        source = sources[leaf_name(path)]
        kind = leaf_dtype(dtype, [weights.dtypes[name] for name in source.tensors])
        leaf = jax.ShapeDtypeStruct(leaf.shape, kind)
        place = _place(sharding, leaf_name(path), leaf)
        return fill(leaf, place, source.stacked, functools.partial(source.read, weights))

    return jax.tree_util.tree_map_with_path(read, skeleton)


def _place(sharding, path: str, leaf: jax.ShapeDtypeStruct) -> Sharding | None:
    if sharding is None or isinstance(sharding, Sharding):
        return sharding
    return sharding(path, leaf)
