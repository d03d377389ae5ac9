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
from .tensor_names import Index, Source, parts_of, rows_of_parts, source_of


@dataclasses.dataclass(frozen=True)
class LeafSource:
    """The tensors of one leaf: a single tensor, or one for each layer, or for each expert of each.

    **Arguments:**

    - `tensors`: the names of the tensors, in the order of the layers that have one, and in each of
        its experts.
    - `rows`: for each output of the leaf, its place among the outputs of the tensor.
    - `outputs`: the number of outputs of the tensor.
    - `source`: the module that holds the leaf.
    - `shape`: the shape of the leaf in one layer.
    - `stacked`: whether the leaf has a leading axis of layers.
    """

    tensors: tuple[str, ...]
    rows: np.ndarray
    outputs: int
    source: Source
    shape: tuple[int, ...]
    stacked: bool

    def read(self, weights: Weights, layer: int, index: Index) -> np.ndarray:
        """The part of the leaf at `index`, in one of the layers that have it."""
        if self.source.experts is None:
            return self._read(weights, self.tensors[layer], None, index)
        (start, stop), *inner = index
        part = None
        for expert in range(start, stop):
            if self.source.experts == "each":
                name = self.tensors[layer * self.shape[0] + expert]
                own = self._read(weights, name, None, tuple(inner))
            else:
                own = self._read(weights, self.tensors[layer], expert, tuple(inner))
            if part is None:
                part = np.empty((stop - start, *own.shape), own.dtype)
            part[expert - start] = own
        assert part is not None
        return part

    def _read(self, weights: Weights, name: str, expert: int | None, index: Index) -> np.ndarray:
        """The part at `index` of a tensor, or of one expert of a tensor for all of them."""
        (start, stop), *other_axes = index
        rows = self.rows[start:stop]
        first, last = int(rows[0]), int(rows[-1]) + 1
        span = ((first, last), *other_axes)
        span = span[::-1] if self.source.transposed else span
        if expert is None:
            tensor = weights.read(name, span)
        else:
            tensor = weights.read(name, ((expert, expert + 1), *span))[0]
        tensor = self.source.transpose(tensor)
        # The outputs of a fused module may have outputs of its other parts in between.
        return tensor if last - first == len(rows) else tensor[rows - first]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        experts, inner = self.shape[:1], self.shape[1:]
        if self.source.experts is None:
            experts, inner = (), self.shape
        shape = (self.outputs, *inner[1:])
        shape = shape[::-1] if self.source.transposed else shape
        return (*experts, *shape) if self.source.experts == "stacked" else shape


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
        tensors = tuple(
            source.tensor(layer, suffix, expert)
            for layer in layers
            for expert in range(source.tensors_in_layer(skeleton.config))
        )
        if bare:
            tensors = tuple(name.removeprefix(prefix) for name in tensors)
        parts = parts_of(names, source.module)
        outputs = 0 if source.experts is None else 1
        sizes = [shapes[f"{part}.{suffix}"][outputs] for part in parts]
        rows = rows_of_parts(sizes, source.block_count(skeleton.config))
        own = rows[parts.index(path.rsplit(".", 1)[0])]
        sources[path] = LeafSource(tensors, own, sum(sizes), source, shape, stacked)
    return _tied(weights, skeleton, sources)


def _tied(
    weights: Weights, skeleton: Transformer, sources: dict[str, LeafSource]
) -> dict[str, LeafSource]:
    """Reads the embedding from the unembedding, if they are tied and only the latter is stored."""
    embedding = sources["embedding.weight"]
    unembedding = FAMILIES[skeleton.config.family].names["head"].tensor(0, "weight")
    only = unembedding in weights.shapes and embedding.tensors[0] not in weights.shapes
    if not skeleton.config.tied or not only:
        return sources
    moved = dataclasses.replace(embedding, tensors=(unembedding,))
    return {**sources, "embedding.weight": moved}
