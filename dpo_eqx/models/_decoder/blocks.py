"""Stacks of layers of several kinds, and the scans that run them.

A part that all layers have, such as a norm, is stacked over all layers. Attention, what replaces
it, and the kinds of feed-forward blocks are stacked over the layers that have them. Nothing here
knows what a layer computes.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..._jax.paths import leaf_name
from ..._jax.rounding import rounded_if_fused
from .config import Config
from .residuals import CHOICES, KEPT

MIXERS = ("attention", "recurrence")
# The optional part at the front of a path, behind the name of the stack.
_PART = re.compile(r"^\w+\.(attention|recurrence|feed_forward|dense_feed_forward)(\.|$)")
# The optional parts that a layer has: what mixes its tokens, and its feed-forward block.
Kind = tuple[str, ...]


class Caches(NamedTuple):
    """What the layers of each kind keep, stacked over these layers."""

    attention: Any = None
    recurrence: Any = None


class Run(NamedTuple):
    """Neighbouring layers that repeat a block.

    **Arguments:**

    - `start`: the number of the first layer.
    - `block`: the kind of each layer of the block.
    - `repeats`: how often the block comes.
    """

    start: int
    block: tuple[Kind, ...]
    repeats: int


def layers_at(path: str, config: Config) -> tuple[int, ...]:
    """The numbers of the layers along the first axis of the leaf at a path below `layers`."""
    part = part_of(path)
    return tuple(i for i, kind in enumerate(config.kinds) if part is None or part in kind)


def part_of(path: str) -> str | None:
    """The optional part that a leaf belongs to; `None` for a part that all layers have."""
    match = _PART.match(path)
    return match[1] if match else None


def keep_own(layers: PyTree, config: Config) -> PyTree:
    """Stacks over all layers, cut to the layers that have each part."""

    def own(path, leaf):
        numbers = layers_at(f"layers.{leaf_name(path)}", config)
        return leaf if len(numbers) == config.layers else leaf[jnp.asarray(numbers)]

    return jax.tree_util.tree_map_with_path(own, layers)


def runs_of(kinds: Sequence[Kind]) -> list[Run]:
    """Splits the layers into runs such that the blocks have the fewest layers in sum.

    A scan compiles the layers of its block once, so that is what a program grows with. Among equal
    sums the fewest runs win.
    """
    best: list[tuple[int, list[Run]]] = [(0, [])]
    for stop in range(1, len(kinds) + 1):
        options = []
        for size in range(1, stop + 1):
            block = tuple(kinds[stop - size : stop])
            start, repeats = stop, 0
            while start >= size and tuple(kinds[start - size : start]) == block:
                start, repeats = start - size, repeats + 1
                cost, runs = best[start]
                options.append((cost + size, [*runs, Run(start, block, repeats)]))
        best.append(min(options, key=lambda option: (option[0], len(option[1]))))
    return best[-1][1]


def scan_layers(
    body: Callable[[Kind, Array, Any], tuple[Array, Caches]],
    x: Array,
    stacks: PyTree,
    kinds: Sequence[Kind],
    *,
    remat: bool,
    unroll: bool,
) -> tuple[Array, Caches]:
    """Runs all layers, a scan for each run of repeated blocks; each layer is a checkpoint.

    **Arguments:**

    - `body`: `(kind, x, inputs) -> (x, caches)` for one layer, with the caches of its own mixer.
    - `x`: the input of the first layer.
    - `stacks`: a tuple of the layers' inputs, stacked. What is under an attribute of an entry with
        the name of an optional part is stacked over the layers that have the part.
    - `kinds`: the kind of each layer.
    - `remat`: whether each layer is recomputed as a whole in the backward pass.
    - `unroll`: whether the program has the code of every layer, rather than loops.

    **Returns:**

    The output of the last layer, and the caches of all layers.
    """
    runs, caches = runs_of(kinds), []
    for run in runs:
        # In a loop, common subexpressions cannot undo the recomputation, and preventing them is
        # slow. In straight code they can. XLA turns a loop of one step into that.
        alone = (unroll or run.repeats == 1) and len(kinds) > 1
        policy = CHOICES if remat else KEPT
        layer = partial(jax.checkpoint, prevent_cse=alone, policy=policy)
        own = _take_run(stacks, run, kinds)
        run_block = partial(_run_block, body, layer, run.block, unroll)
        x, new = jax.lax.scan(run_block, x, own, unroll=unroll)
        caches.append(_flatten(new) if len(run.block) > 1 else new)
    return x, caches[0] if len(runs) == 1 else _joined(caches)


def run_layers(
    body: Callable[[Kind, Array, Any], tuple[Array, Caches]],
    x: Array,
    inputs: Iterable[Any],
    kinds: Sequence[Kind],
) -> tuple[Array, tuple[Caches, ...]]:
    """Runs layers whose inputs are not stacked; the rest is as for `scan_layers`.

    **Returns:**

    The output of the last layer, and the caches of each layer.
    """
    # Traced once for each kind of layer.
    bodies = {kind: jax.jit(partial(body, kind)) for kind in set(kinds)}
    caches = []
    for kind, own in zip(kinds, inputs, strict=True):
        x, new = bodies[kind](x, own)
        # As between the layers of a block.
        x = rounded_if_fused(x)
        caches.append(new)
    return x, tuple(caches)


def take_apart(stacks: PyTree, kinds: Sequence[Kind]) -> tuple[PyTree, ...]:
    """The inputs of each layer, from stacks as for `scan_layers`."""
    return tuple(_take_layer(stacks, kinds, place) for place in range(len(kinds)))


def _run_block(body, checkpoint, block, unroll, x, inputs) -> tuple[Array, Caches]:
    """The layers of one block, one after the other."""
    if len(block) == 1:
        x, caches = checkpoint(partial(body, block[0]))(x, inputs)
        return rounded_if_fused(x) if unroll else x, caches
    new: dict[str, list[Any]] = {mixer: [] for mixer in MIXERS}
    for place, kind in enumerate(block):
        x, caches = checkpoint(partial(body, kind))(x, _take_layer(inputs, block, place))
        # Between layers of a block XLA can keep float32, which it cannot between steps of a loop.
        x = rounded_if_fused(x)
        for mixer in MIXERS:
            if (cache := getattr(caches, mixer)) is not None:
                new[mixer].append(cache)
    stacked = {
        mixer: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) if each else None
        for mixer, each in new.items()
    }
    return x, Caches(**stacked)


def _take_run(stacks: PyTree, run: Run, kinds: Sequence[Kind]) -> PyTree:
    """The part of each stack that belongs to a run, with an axis of repeats and one of a block."""

    def take(path, leaf):
        part = part_of(leaf_name(path))
        start, size = count(part, kinds[: run.start]), count(part, run.block)
        stop = start + size * run.repeats
        if size == 0:
            return None
        own = leaf if stop - start == len(leaf) else leaf[start:stop]
        return own if len(run.block) == 1 else own.reshape(run.repeats, size, *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(take, stacks)


def _take_layer(inputs: PyTree, block: Sequence[Kind], place: int) -> PyTree:
    """The inputs of one layer of a block, `None` for the parts that it does not have."""

    def take(path, leaf):
        part = part_of(leaf_name(path))
        if part is not None and part not in block[place]:
            return None
        return leaf[count(part, block[:place])]

    return jax.tree_util.tree_map_with_path(take, inputs)


def count(part: str | None, kinds: Sequence[Kind]) -> int:
    """The number of layers with a part; all of them if `part` is `None`."""
    return sum(part is None or part in kind for kind in kinds)


def _flatten(caches: Caches) -> Caches:
    """Caches with the axes of repeats and of a block as one axis of layers."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), caches)


def _joined(caches: list[Caches]) -> Caches:
    """The caches of all runs, one after the other; a run without a kind of layers has none."""

    def join(parts: list[Any]) -> Any:
        present = [part for part in parts if part is not None]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *present) if present else None

    return Caches(*(join(list(parts)) for parts in zip(*caches, strict=True)))
