"""Maps our linear layers to linear layers of a checkpoint, and splits or joins their adapters.

Some families fuse several of our layers into one, as GPT-2 its queries, keys and values. Experts
are two parameters of one module for all of them, or modules of their own in adapters from before
`transformers` 5. `load.py` reads the files, and `save.py` writes them.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence, Set
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

# The parameters of a module of experts, in the order in which PEFT wraps them, and our layers.
_EXPERTS = {
    "gate_up_proj": ("layers.feed_forward.gate", "layers.feed_forward.up"),
    "down_proj": ("layers.feed_forward.down",),
}
# Our layers beside them, each the weight of a module. PEFT takes the names of the modules of dense
# blocks for older names of experts.
_BESIDE = re.compile(r"^layers\.(feed_forward\.router|dense_feed_forward\.\w+)$")


class Pair(NamedTuple):
    """The adapters of one linear layer, on the host.

    They are stacked over the layers of the decoder, and over the experts of each of these.
    """

    down: Float[np.ndarray, "layers rank in"]
    up: Float[np.ndarray, "layers out rank"]
    scale: float


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear layer of a checkpoint, in every layer of the decoder that has it.

    **Arguments:**

    - `module`: its name, with `{}` for the number of the layer, and another `{}` for the number of
        an expert that has a module of its own.
    - `layers`: the numbers of the layers that have it.
    - `stacked`: whether our parameters have a leading axis of layers.
    - `paths`: the paths of our layers, each one a part of its outputs.
    - `parts`: the same, with `None` for a part without an adapter.
    - `rows`: the outputs that belong to each part.
    - `transposed`: whether its weight is stored as `(in, out)`.
    - `experts`: the number of experts in each layer, 0 for a layer without.
    - `parameter`: the parameter of the module that has the adapter, if PEFT knows it as a parameter
        rather than as a linear module: all experts, a router, a dense block beside experts.
    """

    module: str
    layers: tuple[int, ...]
    stacked: bool
    paths: tuple[str, ...]
    parts: tuple[str | None, ...]
    rows: tuple[np.ndarray, ...]
    transposed: bool
    experts: int = 0
    parameter: str = ""

    def names(self) -> list[str]:
        """The name of the module in each layer, or of the parameter, or of each expert's module."""
        if self.parameter:
            return [f"{self.module.format(layer)}.{self.parameter}" for layer in self.layers]
        experts = range(self.experts or 1)
        return [self.module.format(layer, i) for layer in self.layers for i in experts]

    @property
    def experts_at_once(self) -> int:
        """The number of experts of which one name has the weights; 1 without experts."""
        return (self.experts or 1) if self.parameter else 1

    @property
    def pattern(self) -> str:
        """The name with stars for the numbers."""
        return ".".join(filter(None, (self.module.format("*", "*"), self.parameter)))

    def to_file(
        self, down: Float[np.ndarray, "experts rank in"], up: Float[np.ndarray, "experts out rank"]
    ) -> tuple[np.ndarray, np.ndarray]:
        """$A$ and $B$ of one of the names, as PEFT has them.

        A parameter's rows of $A$ are in turn those of each expert; the columns of $B$ are in turn
        the first ones of all experts, the second ones, and so on.
        """
        columns = up.transpose(1, 2, 0).reshape(up.shape[1], -1)
        return down.reshape(-1, down.shape[2]), columns

    def from_file(
        self, letter: str, x: Float[np.ndarray, "rows columns"]
    ) -> Float[np.ndarray, "experts own_rows own_columns"]:
        """The inverse of `to_file`, for $A$ or $B$."""
        count = self.experts_at_once
        if letter == "A":
            return x.reshape(count, -1, x.shape[1])
        return x.reshape(x.shape[0], -1, count).transpose(2, 0, 1)

    @property
    def outputs(self) -> int:
        """The number of outputs of the whole layer."""
        return sum(map(len, self.rows))


def sites_of(policy: Transformer, paths: Iterable[str]) -> list[Site]:
    """The linear layers of the checkpoint that hold our layers at `paths`."""
    found, mixture = set(paths), _mixture_paths(policy)
    shapes = linear_shapes(policy)
    sites = _modules(policy, found - mixture, shapes)
    names = FAMILIES[policy.config.family].names
    parameters = [("experts", name, paths) for name, paths in _EXPERTS.items()]
    parameters += [
        (names[path].module.rsplit(".", 1)[1], "weight", (path,))
        for path in sorted(found & mixture)
        if _BESIDE.match(path)
    ]
    for module, parameter, parts in parameters:
        if found & mixture & set(parts):
            site = _site(policy, f"model.layers.{{}}.mlp.{module}", parts, found, shapes)
            sites.append(dataclasses.replace(site, parameter=parameter, transposed=False))
    return sites


def older_sites(policy: Transformer) -> list[Site]:
    """Routers and feed-forward blocks as modules, if the checkpoint has one for each expert.

    Adapters have these names if they are from before `transformers` 5.
    """
    names = FAMILIES[policy.config.family].names
    paths = _mixture_paths(policy)
    each = any(names[path].experts == "each" for path in paths)
    return _modules(policy, paths, linear_shapes(policy)) if each else []


def _mixture_paths(policy: Transformer) -> set[str]:
    """The paths of our layers of experts, of their routers, and of dense blocks beside experts."""
    if not policy.config.experts:
        return set()
    experts = {path for paths in _EXPERTS.values() for path in paths}
    beside = {path for path in linear_shapes(policy) if _BESIDE.match(path)}
    return experts | beside


def _modules(
    policy: Transformer, paths: Set[str], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> list[Site]:
    """The modules of the checkpoint that hold our layers at `paths`."""
    names = FAMILIES[policy.config.family].names
    modules = sorted({names[path].module for path in paths})
    return [_site(policy, module, parts_of(names, module), paths, shapes) for module in modules]


def stored_name(name: str, adapted: Set[str]) -> str:
    """The name of the module in a file that has the adapter of a module or of a parameter.

    PEFT wraps a module once for each of its parameters in `adapted`, the names with an adapter. The
    first of them is innermost.
    """
    module, _, last = name.rpartition(".")
    if last == "weight":
        return module
    if not module.endswith(".mlp.experts"):
        return name
    later = list(_EXPERTS)[list(_EXPERTS).index(last) + 1 :]
    return module + ".base_layer" * sum(f"{module}.{other}" in adapted for other in later)


def linear_shapes(policy: Transformer) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of the weight of each linear layer, by the layer's path.

    They come from the configuration, since the policy may hold its adapters alone.
    """
    plain = eqx.filter_eval_shape(partial(Transformer, policy.config), key=jax.random.key(0))
    nodes = jax.tree_util.tree_leaves_with_path(plain, is_leaf=is_linear)
    return {leaf_name(path): weight_shape(node) for path, node in nodes if is_linear(node)}


def short_name(policy: Transformer, site: Site) -> str:
    """The shortest end of a layer's name that is unique, and that is the same in all layers."""
    if site.parameter:
        return site.pattern.rsplit("*.", 1)[1]
    modules = {source.module for source in FAMILIES[policy.config.family].names.values()}
    ends = [module.rsplit(".", 1)[-1] for module in modules]
    end = site.module.rsplit(".", 1)[-1]
    return end if ends.count(end) == 1 else site.module.rsplit("{}.", 1)[-1]


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
    up = np.zeros((len(first.up), site.outputs, rank), first.up.dtype)
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
    paths: Sequence[str],
    found: Set[str],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> Site:
    names = FAMILIES[policy.config.family].names
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
        experts=policy.config.experts
        if source.experts is not None and source.count == "experts"
        else 0,
    )
