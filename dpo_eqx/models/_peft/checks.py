"""What must hold before the first tensor of an adapter is read.

All problems are found at once, and named with what was expected and what was found.
"""

from collections.abc import Mapping

import jax
import numpy as np

from .._checkpoint.checks import shorten
from .._checkpoint.families import FAMILIES
from .._checkpoint.folder import ADAPTER_CONFIG, DTYPES, Weights
from .._checkpoint.tensor_names import source_of
from .._decoder.transformer import Transformer
from .checkpoint_layers import Site
from .config import PeftConfig

_PREFIX = "base_model.model."


def tensor_name(module: str, letter: str) -> str:
    """The name in an adapter of $A$ or $B$, the `letter`, of the module of this name."""
    return f"{_PREFIX}{module}.lora_{letter}.weight"


def check_sites(config: PeftConfig, known: list[Site], sites: list[Site]) -> None:
    """Raises if no layer has an adapter, or those of one stack are not of one rank and scale."""
    if not sites:
        names = ", ".join(site.module.format("*") for site in known)
        raise ValueError(
            f"`target_modules` of the adapter, {config.targets!r}, match no linear layer of "
            f"`policy`, which has {names}. Give the base that the adapter was trained on."
        )
    for site in sites:
        kinds = {(config.rank_of(n), config.scale_of(n)) for n in site.names() if config.has(n)}
        if len(kinds) > 1:
            raise ValueError(
                "`rank_pattern` and `alpha_pattern` must give all layers of "
                f"{site.module.format('*')} one rank and scale, since they are stacked; got "
                f"{sorted(kinds)}. Merge the adapter into its base with PEFT, and load that."
            )


def check_tensors(
    weights: Weights,
    config: PeftConfig,
    sites: list[Site],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    policy: Transformer,
) -> None:
    """Raises if tensors are missing, extra, of other shapes or ranks, or of another dtype."""
    copies = _copies(weights, policy)
    expected: dict[str, tuple[int, ...]] = {}
    for site in sites:
        out, width = shapes[next(filter(None, site.parts))].shape[-2:]
        for name in filter(config.has, site.names()):
            rank = config.rank_of(name)
            expected[tensor_name(name, "A")] = rank, width
            expected[tensor_name(name, "B")] = out * len(site.parts), rank
    found = weights.shapes
    problems = [f"missing: {n}, of shape {expected[n]}" for n in expected.keys() - found.keys()]
    problems += [
        f"extra: {n}, of shape {found[n]}" for n in found.keys() - expected.keys() - copies.keys()
    ]
    problems += [f"{n} differs from the policy's" for n, is_same in copies.items() if not is_same]
    for name in expected.keys() & found.keys():
        problems += _differences(name, expected[name], found[name], weights.dtypes[name])
    if problems:
        raise ValueError(
            f"The tensors in {weights.folder} are not those that its {ADAPTER_CONFIG} and "
            f"`policy` ask for. {shorten(sorted(problems))} Give the base that the adapter was "
            "trained on; one of other layers than linear ones is to be merged into it with PEFT."
        )


def _copies(weights: Weights, policy: Transformer) -> dict[str, bool]:
    """The base's own embedding and unembedding, which PEFT may add: whether they are the policy's.

    It does so where the unembedding has an adapter.
    """
    parameters = {
        "embedding.weight": policy.embedding.weight,
        "head.weight": policy.unembedding,
        "head.bias": policy.unembedding_bias,
    }
    names = FAMILIES[policy.config.family].names
    same = {}
    for path, ours in parameters.items():
        source, suffix = source_of(names, path)
        for name in (f"{source.module}.{suffix}", f"{source.module}.base_layer.{suffix}"):
            if f"{_PREFIX}{name}" in weights.shapes and ours is not None:
                theirs = weights.read(f"{_PREFIX}{name}").astype(ours.dtype)
                same[f"{_PREFIX}{name}"] = np.array_equal(theirs, ours)
    return same


def _differences(name: str, want: tuple[int, ...], got: tuple[int, ...], dtype: str) -> list[str]:
    axis = 0 if ".lora_A." in name else 1
    if dtype not in DTYPES:
        return [f"{name} is of dtype {dtype}, not of {list(DTYPES)}"]
    if got == want:
        return []
    if len(got) == 2 and got[1 - axis] == want[1 - axis]:
        return [f"{name} is of rank {got[axis]}, its configuration says {want[axis]}"]
    return [f"mis-shaped: {name} should be {want}, is {got}"]
