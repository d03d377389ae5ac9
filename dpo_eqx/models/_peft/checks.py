"""Checks of an adapter before its first tensor is read.

One error lists all problems, each with what was expected and what was found.
"""

from collections.abc import Mapping, Set

import jax
import numpy as np

from .._checkpoint.checks import shorten
from .._checkpoint.families import FAMILIES
from .._checkpoint.folder import ADAPTER_CONFIG, DTYPES, Weights
from .._checkpoint.tensor_names import source_of
from .._decoder.transformer import Transformer
from .checkpoint_layers import Site, stored_name
from .config import PeftConfig

PREFIX = "base_model.model."


def tensor_name(module: str, letter: str) -> str:
    """The name of a module's $A$ or $B$ in an adapter's file; `letter` is A or B."""
    return f"{PREFIX}{module}.lora_{letter}.weight"


def magnitude_name(module: str) -> str:
    """The name of a module's magnitudes (DoRA) in an adapter's file."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def check_sites(config: PeftConfig, known: list[Site], sites: list[Site]) -> None:
    """Raises if no layer has an adapter, or if rank or scale differ within a stack of layers."""
    if not sites:
        names = ", ".join(site.pattern for site in known)
        nor = f", nor do `target_parameters`, {config.parameters!r}" if config.parameters else ""
        raise ValueError(
            f"`target_modules` of the adapter, {config.targets!r}, match no linear layer of "
            f"its base{nor}, so it is of another base. This one has {names}. Give the base that "
            "the adapter was trained on."
        )
    for site in sites:
        kinds = {(config.rank_of(name), config.scale_of(name)) for name in config.names_in(site)}
        if len(kinds) > 1:
            raise ValueError(
                "`rank_pattern` and `alpha_pattern` must give all layers of "
                f"{site.pattern} one rank and scale, since they are stacked; got "
                f"{sorted(kinds)}. Merge the adapter into its base with PEFT, and load the result."
            )


def check_tensors(
    weights: Weights,
    config: PeftConfig,
    sites: list[Site],
    adapted: Set[str],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    policy: Transformer,
    modules: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises if tensors are missing or extra, or have a wrong shape, rank or dtype.

    **Arguments:**

    - `adapted`: the names of the modules and parameters of `sites` that have an adapter.
    - `modules`: the shapes of the tensors of `modules_to_save`, by their names.
    """
    expected = dict(modules)
    copies = {n: is_same for n, is_same in _copies(weights, policy).items() if n not in modules}
    for site in sites:
        width = shapes[next(filter(None, site.parts))].shape[-1]
        for name in filter(adapted.__contains__, site.names()):
            rank = config.rank_of(name) * site.experts_at_once
            module = stored_name(name, adapted)
            expected[tensor_name(module, "A")] = rank, width
            expected[tensor_name(module, "B")] = site.outputs, rank
            if config.dora:
                expected[magnitude_name(name)] = (site.outputs,)
    stored = weights.shapes
    problems = [f"missing: {n}, of shape {expected[n]}" for n in expected.keys() - stored.keys()]
    problems += [
        f"extra: {n}, of shape {stored[n]}" for n in stored.keys() - expected.keys() - copies.keys()
    ]
    problems += [f"{n} differs from the policy's" for n, is_same in copies.items() if not is_same]
    for name in expected.keys() & stored.keys():
        problems += _differences(name, expected[name], stored[name], weights.dtypes[name])
    if problems:
        raise ValueError(
            f"The adapter in {weights.folder} is of another base, or does not match its "
            f"{ADAPTER_CONFIG}: {shorten(sorted(problems), limit=3)} Give the base that "
            "`base_model_name_or_path` in it names. An adapter of layers that are not linear has "
            "to be merged into its base with PEFT."
        )


def _copies(weights: Weights, policy: Transformer) -> dict[str, bool]:
    """Whether each copy of the base's embedding or unembedding equals the policy's, by its name.

    PEFT adds these copies if the unembedding has an adapter.
    """
    parameters = {
        "embedding.weight": policy.embedding.weight,
        "head.weight": policy.unembedding,
        "head.bias": policy.unembedding_bias,
    }
    names = FAMILIES[policy.config.family].names
    is_equal = {}
    for path, parameter in parameters.items():
        source, suffix = source_of(names, path)
        for name in (f"{source.module}.{suffix}", f"{source.module}.base_layer.{suffix}"):
            if f"{PREFIX}{name}" in weights.shapes and parameter is not None:
                copy = weights.read(f"{PREFIX}{name}").astype(parameter.dtype)
                is_equal[f"{PREFIX}{name}"] = np.array_equal(copy, parameter)
    return is_equal


def _differences(name: str, want: tuple[int, ...], got: tuple[int, ...], dtype: str) -> list[str]:
    # $A$ has its rank along the first axis, $B$ along the second.
    axis = 0 if ".lora_A." in name else 1
    if dtype not in DTYPES:
        return [f"{name} is of dtype {dtype}, not of {list(DTYPES)}"]
    if got == want:
        return []
    if len(got) == 2 and got[1 - axis] == want[1 - axis]:
        return [f"{name} is of rank {got[axis]}, its configuration says {want[axis]}"]
    return [f"mis-shaped: {name} should be {want}, is {got}"]
