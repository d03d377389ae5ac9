"""Finds the tensors of a checkpoint that make up each leaf of a policy, and reads parts of them.

The names are in `tensor_names.py`.
"""

import dataclasses

import jax
import numpy as np

from ..._jax.paths import leaf_name
from .._decoder.transformer import Transformer
from .families import FAMILIES
from .folder import Weights
from .tensor_names import Index, Source, source_of


@dataclasses.dataclass(frozen=True)
class LeafSource:
    """The tensors of one leaf: a single tensor, or one for each layer.

    **Arguments:**

    - `tensors`: the names of the tensors.
    - `source`: which part of each tensor is used, and how it is stored.
    - `shape`: the shape of the leaf in one layer.
    - `stacked`: whether the leaf has a leading axis of layers.
    """

    tensors: tuple[str, ...]
    source: Source
    shape: tuple[int, ...]
    stacked: bool

    def read(self, weights: Weights, layer: int, index: Index) -> np.ndarray:
        """The part of the leaf at `index`, in one layer."""
        tensor = weights.read(self.tensors[layer], self.source.stored_index(index, self.shape))
        return tensor.T if self.source.transposed else tensor


def sources_in(weights: Weights, skeleton: Transformer) -> dict[str, LeafSource]:
    """The tensors in `weights` of each leaf of `skeleton`, by the leaf's path."""
    names = FAMILIES[skeleton.config.family].names
    # Checkpoints of a base model lack the prefix, which all tensors but the unembedding have.
    prefix = names["embedding"].module.split(".")[0] + "."
    bare = not any(name.startswith(prefix) for name in weights.shapes)
    sources = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(skeleton):
        source, suffix = source_of(names, leaf_name(path))
        stacked = leaf_name(path).startswith("layers.")
        layers = range(leaf.shape[0]) if stacked else range(1)
        tensors = tuple(source.tensor(layer, suffix) for layer in layers)
        if bare:
            tensors = tuple(name.removeprefix(prefix) for name in tensors)
        shape = leaf.shape[1:] if stacked else leaf.shape
        sources[leaf_name(path)] = LeafSource(tensors, source, shape, stacked)
    return _tied(weights, skeleton, sources)


def _tied(
    weights: Weights, skeleton: Transformer, sources: dict[str, LeafSource]
) -> dict[str, LeafSource]:
    """Reads the embedding from the unembedding, if they are tied and only the latter is stored."""
    embedding = sources["embedding.weight"]
    unembedding = FAMILIES[skeleton.config.family].names["head"].tensor(0, "weight")
    only = unembedding in weights.shapes and embedding.tensors[0] not in weights.shapes
    if skeleton.head is not None or not only:
        return sources
    moved = dataclasses.replace(embedding, tensors=(unembedding,))
    return {**sources, "embedding.weight": moved}
