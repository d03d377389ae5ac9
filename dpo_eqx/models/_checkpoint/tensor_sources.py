"""Finds the tensors of a checkpoint that make up each leaf of a policy, and reads parts of them.

The names are in `tensor_names.py`.
"""

import dataclasses

import jax
import numpy as np

from ..._jax.paths import leaf_name
from .._decoder.blocks import layers_at
from .._decoder.transformer import Transformer
from .families import FAMILIES
from .folder import Weights
from .tensor_names import Index, parts_of, rows_of_parts, source_of


@dataclasses.dataclass(frozen=True)
class LeafSource:
    """The tensors of one leaf: a single tensor, or one for each layer.

    **Arguments:**

    - `tensors`: the names of the tensors, in the order of the layers that have one.
    - `rows`: for each output of the leaf, its place among the outputs of the tensor.
    - `outputs`: the number of outputs of the tensor.
    - `transposed`: whether the tensor is stored as `(in, out)`.
    - `shape`: the shape of the leaf in one layer.
    - `stacked`: whether the leaf has a leading axis of layers.
    """

    tensors: tuple[str, ...]
    rows: np.ndarray
    outputs: int
    transposed: bool
    shape: tuple[int, ...]
    stacked: bool

    def read(self, weights: Weights, layer: int, index: Index) -> np.ndarray:
        """The part of the leaf at `index`, in one of the layers that have it."""
        (start, stop), *other_axes = index
        rows = self.rows[start:stop]
        first, last = int(rows[0]), int(rows[-1]) + 1
        span = ((first, last), *other_axes)
        tensor = weights.read(self.tensors[layer], span[::-1] if self.transposed else span)
        tensor = tensor.T if self.transposed else tensor
        # The outputs of a fused module may have outputs of its other parts in between.
        return tensor if last - first == len(rows) else tensor[rows - first]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        shape = (self.outputs, *self.shape[1:])
        return shape[::-1] if self.transposed else shape


def sources_in(weights: Weights, skeleton: Transformer) -> dict[str, LeafSource]:
    """The tensors in `weights` of each leaf of `skeleton`, by the leaf's path."""
    names = FAMILIES[skeleton.config.family].names
    # Checkpoints of a base model lack the prefix, which all tensors but the unembedding have.
    prefix = names["embedding"].module.split(".")[0] + "."
    bare = not any(name.startswith(prefix) for name in weights.shapes)
    leaves = jax.tree_util.tree_leaves_with_path(skeleton)
    shapes = {
        leaf_name(path): leaf.shape[1:] if leaf_name(path).startswith("layers.") else leaf.shape
        for path, leaf in leaves
    }
    sources = {}
    for path, shape in shapes.items():
        source, suffix = source_of(names, path)
        stacked = path.startswith("layers.")
        layers = layers_at(path, skeleton.config) if stacked else (0,)
        tensors = tuple(source.tensor(layer, suffix) for layer in layers)
        if bare:
            tensors = tuple(name.removeprefix(prefix) for name in tensors)
        parts = parts_of(names, source.module)
        sizes = [shapes[f"{part}.{suffix}"][0] for part in parts]
        rows = rows_of_parts(sizes, source.block_count(skeleton.config))
        own = rows[parts.index(path.rsplit(".", 1)[0])]
        sources[path] = LeafSource(tensors, own, sum(sizes), source.transposed, shape, stacked)
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
