"""Adapters of any Equinox module, named by the paths of their layers.

PEFT has no names for them. `load.py` reads the files and `save.py` writes them, also those in
PEFT's own format.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ..._jax.paths import leaf_name
from .._adapters.first_values import first_magnitude
from .._adapters.linear_layers import Policy, replace_at
from .._adapters.lora import adapters, modules_of
from .._adapters.lora_layer import LoRA
from .._adapters.magnitude import Magnitude
from .._adapters.quantize import is_linear, weight_shape
from .._adapters.whole_module import WholeModule, can_be_whole
from .._checkpoint.checks import shorten
from .._checkpoint.config_values import FLAG, OBJECT, POSITIVE, RATE, SIZE, TEXTS, check_kinds
from .._checkpoint.folder import ADAPTER_CONFIG, DTYPES, Weights

_FORMAT, _VERSION = "dpo_eqx", 1
_DEFAULTS = {"dropout": 0.0, "rank_stabilised": False, "dora": False}
_KINDS = {"rank": SIZE, "scale": POSITIVE, "dropout": RATE, "rank_stabilised": FLAG, "dora": FLAG}


def is_by_path(values: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` describes adapters by path."""
    return values.get("format") == _FORMAT


def write_by_path(
    found: Mapping[str, LoRA], whole: Mapping[str, WholeModule], base: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors and the contents of `adapter_config.json` for adapters by path."""
    tensors: dict[str, np.ndarray] = {}
    for path, lora in found.items():
        tensors[_name(path, "down")] = np.ascontiguousarray(lora.down)
        tensors[_name(path, "up")] = np.ascontiguousarray(lora.up)
        if lora.magnitude is not None:
            tensors[_name(path, "magnitude")] = np.ascontiguousarray(lora.magnitude.change)
    for path, module in whole.items():
        tensors |= {
            _name(path, part): np.ascontiguousarray(getattr(module, part))
            for part in _parts(module)
        }
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "base_model_name_or_path": base,
        "adapters": {path: _setting(lora) for path, lora in found.items()},
        **({"modules": sorted(whole)} if whole else {}),
    }
    return tensors, config


def read_by_path(
    policy: Policy, values: Mapping[str, Any], weights: Weights, dropout: float | None = None
) -> Policy:
    """The policy with the adapters of a folder, added or replacing those that it has.

    **Arguments:**

    - `policy`: the policy, without adapters or with the same adapters.
    - `values`: the contents of the folder's `adapter_config.json`.
    - `weights`: the folder's tensors.
    - `dropout`: the dropout of the adapters (default: the folder's).

    **Raises:**

    `ValueError` if layers, shapes, ranks or scales of the adapters differ from the policy's.
    """
    settings = _settings(values)
    is_node = _is_lora if adapters(policy) else is_linear
    nodes = _nodes(policy, is_node)
    modules = values.get("modules") or []
    check_kinds({"modules": modules}, {"modules": TEXTS}, ADAPTER_CONFIG)
    _check(settings, nodes, weights, _modules(policy, modules))

    def magnitude(path: str, node: Any) -> Magnitude:
        # The lengths at first are the base's, so only their changes are in the file.
        first = node.magnitude if isinstance(node, LoRA) else None
        first = first_magnitude(node) if first is None else first
        change = _array(weights.read(_name(path, "magnitude")))
        return Magnitude(change.astype(first.change.dtype), first.start)

    def place(path: str, node: Any) -> LoRA:
        base, pinned = (node.base, node.pinned) if _is_lora(node) else (node, None)
        down, up = (_array(weights.read(_name(path, part))) for part in ("down", "up"))
        own = settings[path]
        return LoRA(
            base,
            down,
            up,
            own["scale"],
            own["dropout"] if dropout is None else dropout,
            pinned,
            own["rank_stabilised"],
            magnitude(path, node) if own["dora"] else None,
        )

    def place_whole(path: str, node: Any) -> WholeModule:
        whole = node if isinstance(node, WholeModule) else WholeModule.of(node)
        return whole.with_trained(
            tuple(_array(weights.read(_name(path, part))) for part in _parts(whole))
        )

    policy = replace_at(policy, set(settings), is_node, place)
    return replace_at(policy, set(modules), _is_module, place_whole)


def _setting(lora: LoRA) -> dict[str, Any]:
    """What the folder says about one adapter, as far as it is not the default."""
    given = {
        "dropout": lora.dropout,
        "rank_stabilised": lora.rank_stabilised,
        "dora": lora.magnitude is not None,
    }
    return {"rank": lora.down.shape[-2], "scale": lora.scale} | {
        name: value for name, value in given.items() if value != _DEFAULTS[name]
    }


def _settings(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rank, scale and other settings of each adapter, by the path of its layer."""
    if values.get("version") != _VERSION:
        raise ValueError(
            f"`version` in {ADAPTER_CONFIG} must be {_VERSION}; got {values.get('version')!r}. "
            "A newer dpo_eqx may read it."
        )
    entries = values.get("adapters")
    check_kinds({"adapters": entries}, {"adapters": OBJECT}, ADAPTER_CONFIG)
    entries = dict(entries or {})
    check_kinds(entries, dict.fromkeys(entries, OBJECT), f"`adapters` of {ADAPTER_CONFIG}")
    settings = {path: {**_DEFAULTS, **entry} for path, entry in entries.items()}
    for path, setting in settings.items():
        where = f"`adapters` of {ADAPTER_CONFIG}, at {path!r},"
        check_kinds({key: setting.get(key) for key in _KINDS}, _KINDS, where)
    return settings


def _modules(policy: PyTree, paths: Sequence[str]) -> dict[str, Any]:
    """The modules to train whole, by their paths."""
    known = _nodes(policy, _is_module)
    missing = [path for path in paths if path not in known]
    extra = [path for path in modules_of(policy) if path not in paths]
    if missing or extra:
        raise ValueError(
            "`policy` must have the modules that the adapters' file trains whole; there are no "
            f"such modules at {missing}, and the file has none for {extra}. Give the module that "
            "the adapters were saved from."
        )
    return {path: known[path] for path in paths}


def _is_module(node: Any) -> bool:
    return isinstance(node, WholeModule) or can_be_whole(node)


def _parts(module: Any) -> list[str]:
    """The names of a module's parameters, in the order of its leaves."""
    return [part for part in ("weight", "bias") if getattr(module, part, None) is not None]


def _check(
    settings: Mapping[str, Mapping[str, Any]],
    nodes: Mapping[str, Any],
    weights: Weights,
    modules: Mapping[str, Any],
) -> None:
    """Raises if the adapters do not fit the layers, or the tensors do not fit the adapters."""
    problems = [f"no linear layer at {path!r}" for path in settings.keys() - nodes.keys()]
    expected = {
        _name(path, part): getattr(module, part).shape
        for path, module in modules.items()
        for part in _parts(module)
    }
    for path in settings.keys() & nodes.keys():
        rank, scale, node = settings[path]["rank"], settings[path]["scale"], nodes[path]
        if _is_lora(node) and (node.down.shape[-2], node.scale) != (rank, scale):
            problems.append(
                f"rank {rank} and scale {scale} at {path!r}, but `policy` has rank and scale "
                f"{node.down.shape[-2]} and {node.scale}"
            )
        if _is_lora(node) and (node.magnitude is not None) != settings[path]["dora"]:
            problems.append(f"magnitudes (DoRA) at {path!r} in either the file or `policy` alone")
        *lead, out, width = weight_shape(node.base if _is_lora(node) else node).shape
        expected[_name(path, "down")] = (*lead, rank, width)
        expected[_name(path, "up")] = (*lead, out, rank)
        if settings[path]["dora"]:
            expected[_name(path, "magnitude")] = (*lead, out)
    problems += [
        f"no tensors for the adapter that `policy` has at {path!r}"
        for path in nodes.keys() - settings.keys()
        if _is_lora(nodes[path])
    ]
    if not problems:
        problems = _tensor_problems(expected, weights)
    if problems:
        paths = ", ".join(map(repr, sorted(nodes))) or "none"
        raise ValueError(
            f"The adapters in {weights.folder} do not fit `policy`: {shorten(sorted(problems))} "
            "Give the module that they were saved from, with its adapters or without any. "
            f"`policy` has layers at: {paths}."
        )


def _tensor_problems(expected: Mapping[str, tuple[int, ...]], weights: Weights) -> list[str]:
    shapes = weights.shapes
    problems = [f"missing: {n}, of shape {expected[n]}" for n in expected.keys() - shapes.keys()]
    problems += [f"extra: {n}, of shape {shapes[n]}" for n in shapes.keys() - expected.keys()]
    for name in expected.keys() & shapes.keys():
        if shapes[name] != expected[name]:
            problems.append(f"mis-shaped: {name} should be {expected[name]}, is {shapes[name]}")
        if weights.dtypes[name] not in DTYPES:
            problems.append(f"{name} is of dtype {weights.dtypes[name]}, not of {list(DTYPES)}")
    return problems


def _array(x: np.ndarray) -> Array:
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise ValueError(
            f"The adapters are {x.dtype}, which JAX supports only if `jax_enable_x64` is set; set "
            "it."
        )
    return jnp.asarray(x)


def _nodes(policy: PyTree, is_node: Callable[[Any], bool]) -> dict[str, Any]:
    nodes = jax.tree_util.tree_leaves_with_path(policy, is_leaf=is_node)
    return {leaf_name(path): node for path, node in nodes if is_node(node)}


def _is_lora(node: Any) -> bool:
    return isinstance(node, LoRA)


def _name(path: str, part: str) -> str:
    # A policy that is itself one linear layer has an empty path.
    return f"{path}.{part}" if path else part
