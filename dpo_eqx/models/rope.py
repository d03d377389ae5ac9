"""The rotary embeddings of a `config.json`, in both of the ways they are written.

Older files have `rope_theta` and `rope_scaling` (its kind under `type` or `rope_type`), newer ones
`rope_parameters`; where both are there `rope_scaling` goes first, as in `transformers`.
"""

import math
from collections.abc import Mapping
from typing import Any

from .config import Config, Rotary
from .rotary import KINDS


def read_rotary(values: Mapping[str, Any]) -> Rotary:
    """The rotary embeddings that the keys of a `config.json` ask for.

    **Raises:**

    `ValueError` on a kind that is not built, or one of whose settings is missing.
    """
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in KINDS or any(isinstance(value, Mapping) for value in scaling.values()):
        raise ValueError(
            f"The rotary embedding must be one for all layers, of a type in {sorted(KINDS)}; got "
            f"{dict(scaling)}, which is not built."
        )
    length = values.get("original_max_position_embeddings") or scaling.get(
        "original_max_position_embeddings", values["max_position_embeddings"]
    )
    common = {
        "theta": float(_either(scaling, values, "rope_theta", 10000.0)),
        "fraction": float(_either(scaling, values, "partial_rotary_factor", 1.0)),
        "kind": kind,
    }
    try:
        return Rotary(**common, **_READ[kind](scaling, length))
    except KeyError as missing:
        raise ValueError(
            f"The rotary embedding of type {kind!r} needs {missing.args[0]!r} in `rope_scaling` "
            f"or `rope_parameters`; got {dict(scaling)}."
        ) from None


def read_whole_rotary(values: Mapping[str, Any]) -> Rotary:
    """The same where the family always rotates the whole of each head.

    **Raises:**

    `ValueError` also where only a part is to be rotated.
    """
    rotary = read_rotary(values)
    if rotary.fraction != 1:
        raise ValueError(
            f"`partial_rotary_factor` must be 1 in the family {values['model_type']!r}; got "
            f"{rotary.fraction}, which is not built."
        )
    return rotary


def write_rotary(config: Config) -> dict[str, Any]:
    """The same keys from a configuration, in the older way and in the newer one."""
    rotary = config.rotary
    if rotary is None:
        return {}
    scaling = {"rope_type": rotary.kind, **_WRITE[rotary.kind](rotary)}
    common: dict[str, Any] = {"rope_theta": rotary.theta}
    if rotary.fraction != 1:
        common["partial_rotary_factor"] = rotary.fraction
    older = {**scaling, **common} if rotary.kind != "default" else None
    return {**common, "rope_scaling": older, "rope_parameters": {**scaling, **common}}


def _either(first: Mapping, second: Mapping, key: str, default: float) -> float:
    value = first.get(key)
    value = second.get(key) if value is None else value
    return default if value is None else value


def _read_llama3(scaling: Mapping[str, Any], length: int) -> dict[str, Any]:
    return {
        "factor": float(scaling["factor"]),
        "low_frequency": float(scaling["low_freq_factor"]),
        "high_frequency": float(scaling["high_freq_factor"]),
        "original_length": length,
    }


def _read_yarn(scaling: Mapping[str, Any], length: int) -> dict[str, Any]:
    factor = float(scaling["factor"])
    amplitude = scaling.get("attention_factor")
    return {
        "factor": factor,
        "slow": float(scaling.get("beta_slow") or 1),
        "fast": float(scaling.get("beta_fast") or 32),
        "truncate": scaling.get("truncate", True),
        "original_length": length,
        "amplitude": _amplitude(scaling, factor) if amplitude is None else float(amplitude),
    }


def _amplitude(scaling: Mapping[str, Any], factor: float) -> float:
    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return of(over) / of(under) if over and under else of(1.0)


_READ = {
    "default": lambda scaling, length: {},
    "linear": lambda scaling, length: {"factor": float(scaling["factor"])},
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}

_WRITE = {
    "default": lambda rotary: {},
    "linear": lambda rotary: {"factor": rotary.factor},
    "llama3": lambda rotary: {
        "factor": rotary.factor,
        "low_freq_factor": rotary.low_frequency,
        "high_freq_factor": rotary.high_frequency,
        "original_max_position_embeddings": rotary.original_length,
    },
    "yarn": lambda rotary: {
        "factor": rotary.factor,
        "beta_slow": rotary.slow,
        "beta_fast": rotary.fast,
        "truncate": rotary.truncate,
        "attention_factor": rotary.amplitude,
        "original_max_position_embeddings": rotary.original_length,
    },
}
