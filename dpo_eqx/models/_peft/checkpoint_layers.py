"""Maps our linear layers to linear layers of a checkpoint, and splits or joins their adapters.

Some families fuse several of our layers into one, as GPT-2 its queries, keys and values.
`files.py` reads and writes the files.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Set
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float

from ..._jax.paths import leaf_name
from .._adapters.quantize import is_linear, weight_shape
from .._checkpoint.families import FAMILIES
from .._checkpoint.tensor_names import parts_of, rows_of_parts
from .._decoder.blocks import layers_at
from .._decoder.transformer import Transformer


class Pair(NamedTuple):
    """The adapters of one linear layer, stacked over the layers of the decoder, on the host."""

    down: Float[np.ndarray, "layers rank in"]
    up: Float[np.ndarray, "layers out rank"]
    scale: float


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear layer of a checkpoint, in every layer of the decoder that has it.

    **Arguments:**

    - `module`: its name, with `{}` for the number of the layer.
    - `layers`: the numbers of the layers that have it.
    - `stacked`: whether our parameters have a leading axis of layers.
    - `paths`: the paths of our layers, each one a part of its outputs.
    - `parts`: the same, with `None` for a part without an adapter.
    - `rows`: the outputs that belong to each part.
    - `transposed`: whether its weight is stored as `(in, out)`.
    """

    module: str
    layers: tuple[int, ...]
    stacked: bool
    paths: tuple[str, ...]
    parts: tuple[str | None, ...]
    rows: tuple[np.ndarray, ...]
    transposed: bool

    def names(self) -> list[str]:
        """The module's name in each layer."""
        return [self.module.format(layer) for layer in self.layers]

    @property
    def outputs(self) -> int:
        """The number of outputs of the whole layer."""
        return sum(map(len, self.rows))


def sites_of(policy: Transformer, paths: Iterable[str]) -> list[Site]:
    """The linear layers of the checkpoint that hold our layers at `paths`."""
    names = FAMILIES[policy.config.family].names
    found = set(paths)
    shapes = linear_shapes(policy)
    modules = sorted({names[path].module for path in found})
    return [_site(policy, module, found, shapes) for module in modules]


def linear_shapes(policy: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of the weight of each linear layer, by the layer's path.

    They come from the configuration, since the policy may hold its adapters alone.
    """
    plain = eqx.filter_eval_shape(partial(Transformer, policy.config), key=jax.random.key(0))
    nodes = jax.tree_util.tree_leaves_with_path(plain, is_leaf=is_linear)
    return {leaf_name(path): weight_shape(node) for path, node in nodes if is_linear(node)}


def short_names(policy: Transformer) -> dict[str, str]:
    """For each module, the shortest end of its name that is unique."""
    modules = {source.module for source in FAMILIES[policy.config.family].names.values()}
    ends = [module.rsplit(".", 1)[-1] for module in modules]
    return {
        module: end if ends.count(end) == 1 else module.rsplit("{}.", 1)[-1]
        for module, end in zip(modules, ends, strict=True)
    }


def split(site: Site, pair: Pair) -> dict[str, Pair]:
    """The adapter of each of our layers, by its path.

    The parts share $A$ (each gets a copy) and have their own rows of $B$. If no column of $B$
    serves two parts, as in the result of `join`, each part gets only its own columns of $B$ and
    the matching rows of $A$.
    """
    ups = [pair.up[:, rows] for rows in site.rows]
    served = np.array([np.any(up != 0, axis=(0, 1)) for up in ups])
    apart = len(ups) > 1 and bool(np.all(served.sum(axis=0) == 1))
    pairs = {}
    for path, up, nonzero in zip(site.parts, ups, served, strict=True):
        columns = nonzero if apart else np.ones_like(nonzero)
        if path is not None and columns.any():
            pairs[path] = Pair(pair.down[:, columns], up[:, :, columns], pair.scale)
    return pairs


def join(site: Site, pairs: Mapping[str, Pair]) -> Pair:
    """The adapter of the whole layer, exactly equal to the adapters of its parts.

    If all parts share one $A$, the whole keeps it. Otherwise the $A$ are stacked below each other
    and $B$ is block diagonal: the rank of the whole is the sum of the parts' ranks.
    """
    present = [pairs[path] for path in site.parts if path is not None]
    first = present[0]
    if len(site.parts) == 1:
        return first
    alike = all(
        pair.scale == first.scale and np.array_equal(pair.down, first.down) for pair in present
    )
    shares = alike and None not in site.parts
    rank = first.up.shape[2] if shares else sum(pair.up.shape[2] for pair in present)
    up = np.zeros((len(site.layers), site.outputs, rank), first.up.dtype)
    column = 0
    for path, rows in zip(site.parts, site.rows, strict=True):
        if shares:
            up[:, rows] = pairs[str(path)].up
        elif path is not None:
            pair = pairs[path]
            end = column + pair.up.shape[2]
            # The whole has one scale, so the ratio of the scales goes into $B$.
            up[:, rows, column:end] = pair.up * (pair.scale / first.scale)
            column = end
    if shares:
        return Pair(first.down, up, first.scale)
    return Pair(np.concatenate([pair.down for pair in present], axis=1), up, first.scale)


def _site(
    policy: Transformer,
    module: str,
    found: Set[str],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> Site:
    names = FAMILIES[policy.config.family].names
    paths = parts_of(names, module)
    source, stacked = names[paths[0]], paths[0].startswith("layers.")
    sizes = [shapes[path].shape[-2] for path in paths]
    return Site(
        module=module,
        layers=layers_at(paths[0], policy.config) if stacked else (0,),
        stacked=stacked,
        paths=tuple(paths),
        parts=tuple(path if path in found else None for path in paths),
        rows=tuple(rows_of_parts(sizes, source.block_count(policy.config))),
        transposed=source.transposed,
    )
