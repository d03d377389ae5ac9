"""Maps our linear layers to linear layers of a checkpoint, and splits or joins their adapters.

GPT-2 fuses queries, keys and values into one layer; other families have one layer for each.
`files.py` reads and writes the files.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from .._checkpoint.families import FAMILIES
from .._checkpoint.tensor_names import Source
from .._decoder.transformer import Transformer


class Pair(NamedTuple):
    """The adapters of one linear layer, stacked over the layers of the decoder, on the host."""

    down: Float[np.ndarray, "layers rank in"]
    up: Float[np.ndarray, "layers out rank"]
    scale: float


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear layer of a checkpoint, in every layer of the decoder.

    **Arguments:**

    - `module`: its name, with `{}` for the number of the layer.
    - `layers`: the number of layers.
    - `stacked`: whether our parameters have a leading axis of layers.
    - `parts`: the paths of our layers, each one an equal part of its outputs; `None` for a part
        without an adapter.
    - `transposed`: whether its weight is stored as `(in, out)`.
    """

    module: str
    layers: int
    stacked: bool
    parts: tuple[str | None, ...]
    transposed: bool

    def names(self) -> list[str]:
        """The module's name in each layer."""
        return [self.module.format(layer) for layer in range(self.layers)]


def sites_of(policy: Transformer, paths: Iterable[str]) -> list[Site]:
    """The linear layers of the checkpoint that hold our layers at `paths`."""
    names = FAMILIES[policy.config.family].names
    found: dict[str, dict[int, tuple[str, Source]]] = {}
    for path in paths:
        source = names[path]
        found.setdefault(source.module, {})[source.part] = path, source
    return [_site(policy, module, parts) for module, parts in sorted(found.items())]


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
    ups = np.split(pair.up, len(site.parts), axis=1)
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
    if alike and None not in site.parts:
        return Pair(first.down, np.concatenate([pair.up for pair in present], axis=1), first.scale)
    layers, out, _ = first.up.shape
    rank = sum(pair.up.shape[2] for pair in present)
    up = np.zeros((layers, out * len(site.parts), rank), first.up.dtype)
    column = 0
    for number, path in enumerate(site.parts):
        if path is not None:
            pair = pairs[path]
            end = column + pair.up.shape[2]
            rows = slice(number * out, (number + 1) * out)
            # The whole has one scale, so the ratio of the scales goes into $B$.
            up[:, rows, column:end] = pair.up * (pair.scale / first.scale)
            column = end
    return Pair(np.concatenate([pair.down for pair in present], axis=1), up, first.scale)


def _site(policy: Transformer, module: str, parts: Mapping[int, tuple[str, Source]]) -> Site:
    path, source = next(iter(parts.values()))
    stacked = path.startswith("layers.")
    return Site(
        module=module,
        layers=policy.config.layers if stacked else 1,
        stacked=stacked,
        parts=tuple(parts[i][0] if i in parts else None for i in range(source.parts)),
        transposed=source.transposed,
    )
