"""Stacks of layers of several kinds, and the scans that run them.

A part that all layers have, such as a norm, is stacked over all layers. Attention, and what
replaces it, are stacked over the layers that have it. Nothing here knows what a layer computes.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..._jax.paths import leaf_name
from .config import Config
from .residuals import CHOICES, KEPT

MIXERS = ("attention", "recurrence")
# The mixer at the front of a path, behind the name of the stack.
_MIXER = re.compile(r"^\w+\.(attention|recurrence)(\.|$)")


class Caches(NamedTuple):
    """What the layers of each kind keep, stacked over these layers."""

    attention: Any = None
    recurrence: Any = None


class Run(NamedTuple):
    """Neighbouring layers that repeat a block.

    **Arguments:**

    - `start`: the number of the first layer.
    - `block`: the mixer of each layer of the block.
    - `repeats`: how often the block comes.
    """

    start: int
    block: tuple[str, ...]
    repeats: int


def layers_at(path: str, config: Config) -> tuple[int, ...]:
    """The numbers of the layers along the first axis of the leaf at a path below `layers`."""
    mixer = mixer_of(path)
    return tuple(i for i, own in enumerate(config.mixers) if mixer in (None, own))


def mixer_of(path: str) -> str | None:
    """The mixer that a leaf is a part of; `None` for a part that all layers have."""
    match = _MIXER.match(path)
    return match[1] if match else None


def keep_own(layers: PyTree, config: Config) -> PyTree:
    """Stacks over all layers, cut to the layers that have each part."""

    def own(path, leaf):
        numbers = layers_at(f"layers.{leaf_name(path)}", config)
        return leaf if len(numbers) == config.layers else leaf[jnp.asarray(numbers)]

    return jax.tree_util.tree_map_with_path(own, layers)


def runs_of(mixers: Sequence[str]) -> list[Run]:
    """Splits the layers into runs such that the blocks have the fewest layers in sum.

    A scan compiles the layers of its block once, so that is what a program grows with. Among equal
    sums the fewest runs win.
    """
    best: list[tuple[int, list[Run]]] = [(0, [])]
    for stop in range(1, len(mixers) + 1):
        options = []
        for size in range(1, stop + 1):
            block = tuple(mixers[stop - size : stop])
            start, repeats = stop, 0
            while start >= size and tuple(mixers[start - size : start]) == block:
                start, repeats = start - size, repeats + 1
                cost, runs = best[start]
                options.append((cost + size, [*runs, Run(start, block, repeats)]))
        best.append(min(options, key=lambda option: (option[0], len(option[1]))))
    return best[-1][1]


def scan_layers(
    body: Callable[[str, Array, Any], tuple[Array, Caches]],
    x: Array,
    stacks: PyTree,
    mixers: Sequence[str],
    *,
    remat: bool,
) -> tuple[Array, Caches]:
    """Runs all layers, a scan for each run of repeated blocks; each layer is a checkpoint.

    **Arguments:**

    - `body`: `(mixer, x, inputs) -> (x, caches)` for one layer, with the caches of its own mixer.
    - `x`: the input of the first layer.
    - `stacks`: a tuple of the layers' inputs, stacked. What is under an attribute `attention` or
        `recurrence` of an entry is stacked over the layers with that mixer.
    - `mixers`: the mixer of each layer.
    - `remat`: whether each layer is recomputed as a whole in the backward pass.

    **Returns:**

    The output of the last layer, and the caches of all layers.
    """
    runs, caches = runs_of(mixers), []
    for run in runs:
        # In a scan, common subexpressions cannot undo the recomputation, and preventing them is
        # slow. XLA turns a scan of one step into straight code, where they can.
        alone = run.repeats == 1 and len(mixers) > 1
        policy = CHOICES if remat else KEPT
        layer = partial(jax.checkpoint, prevent_cse=alone, policy=policy)
        own = _take_run(stacks, run, mixers)
        x, new = jax.lax.scan(partial(_run_block, body, layer, run.block), x, own)
        caches.append(_flatten(new) if len(run.block) > 1 else new)
    return x, caches[0] if len(runs) == 1 else _joined(caches)


def _run_block(body, checkpoint, block, x, inputs) -> tuple[Array, Caches]:
    """The layers of one block, one after the other."""
    if len(block) == 1:
        return checkpoint(partial(body, block[0]))(x, inputs)
    new: dict[str, list[Any]] = {mixer: [] for mixer in MIXERS}
    for place, mixer in enumerate(block):
        own = _take_layer(inputs, mixer, place, block[:place].count(mixer))
        x, caches = checkpoint(partial(body, mixer))(x, own)
        new[mixer].append(getattr(caches, mixer))
    stacked = {
        mixer: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) if each else None
        for mixer, each in new.items()
    }
    return x, Caches(**stacked)


def _take_run(stacks: PyTree, run: Run, mixers: Sequence[str]) -> PyTree:
    """The part of each stack that belongs to a run, with an axis of repeats and one of a block."""

    def take(path, leaf):
        mixer = mixer_of(leaf_name(path))

        def count(layers: Sequence[str]) -> int:
            return len(layers) if mixer is None else list(layers).count(mixer)

        start, size = count(mixers[: run.start]), count(run.block)
        stop = start + size * run.repeats
        part = leaf if stop - start == len(leaf) else leaf[start:stop]
        if size == 0:
            return None
        return part if len(run.block) == 1 else part.reshape(run.repeats, size, *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(take, stacks)


def _take_layer(inputs: PyTree, mixer: str, place: int, own_place: int) -> PyTree:
    """The inputs of one layer of a block, from its place and its place among those of its kind."""

    def take(path, leaf):
        own = mixer_of(leaf_name(path))
        if own is None:
            return leaf[place]
        return leaf[own_place] if own == mixer else None

    return jax.tree_util.tree_map_with_path(take, inputs)


def _flatten(caches: Caches) -> Caches:
    """Caches with the axes of repeats and of a block as one axis of layers."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), caches)


def _joined(caches: list[Caches]) -> Caches:
    """The caches of all runs, one after the other; a run without a kind of layers has none."""

    def join(parts: list[Any]) -> Any:
        present = [part for part in parts if part is not None]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *present) if present else None

    return Caches(*(join(list(parts)) for parts in zip(*caches, strict=True)))
