"""The rotary embeddings of a `config.json`, in the older and the newer form.

Older files have `rope_theta` and `rope_scaling` (its kind under `type` or `rope_type`), newer ones
`rope_parameters`. If a file has both, `rope_scaling` wins, as in `transformers`.
"""

import math
from collections.abc import Mapping
from typing import Any

from .._decoder.config import Rotary
from .._decoder.rotary import KINDS
from .config_values import (
    FLAG,
    KINDS as KINDS_OF_CONFIG,
    NOT_NEGATIVE,
    NUMBER,
    POSITIVE,
    POSITIVES,
    TEXT,
    check_kinds,
    optional,
    shown,
)

# The two dictionaries, and the keys outside of them that are read.
ROTARY_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
)


def read_rotary(values: Mapping[str, Any], **form: Any) -> Rotary:
    """The rotary embeddings that the keys of a `config.json` describe.

    **Arguments:**

    - `values`: all keys, with defaults filled in.
    - `form`: fields of `Rotary` that the family fixes.

    **Raises:**

    `ValueError` if the kind is not supported, a setting is missing or has the wrong type, or the
    kind does not have a setting.
    """
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    scaling = values.get(name) or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in KINDS or any(isinstance(value, Mapping) for value in scaling.values()):
        raise ValueError(
            f"The rotary embedding must be one for all layers, of a type in {sorted(KINDS)}; got "
            f"{dict(scaling)}, which is not supported."
        )
    check_kinds(scaling, _ROPE_KINDS, f"`{name}` of config.json")
    _check_settings(scaling, kind, name)
    length = values.get("original_max_position_embeddings") or scaling.get(
        "original_max_position_embeddings"
    )
    longest = values["max_position_embeddings"]
    return Rotary(
        theta=float(_either(scaling, values, "rope_theta", 10000.0)),
        fraction=float(_either(scaling, values, "partial_rotary_factor", 1.0)),
        kind=kind,
        **_READ[kind](scaling, length or longest, longest),
        **form,
    )


def _check_settings(scaling: Mapping[str, Any], kind: str, name: str) -> None:
    """Raises if a setting of `kind` is missing, or if there is one that `kind` does not have."""
    needed = set(_NEEDED[kind])
    missing = {key for key in needed if scaling.get(key) is None}
    if kind in ("yarn", "longrope") and "factor" in scaling:
        # A null factor means the ratio of the two lengths.
        missing -= {"factor"}
    if missing:
        raise ValueError(
            f"The rotary embedding of type {kind!r} needs {', '.join(map(repr, sorted(missing)))} "
            f"in `{name}` of config.json; got {dict(scaling)}."
        )
    known = {*needed, *_OPTIONAL.get(kind, ()), *_COMMON}
    unknown = {
        key: value
        for key, value in scaling.items()
        if key not in known and value is not None and not (key == "factor" and value == 1)
    }
    if unknown:
        listed = ", ".join(f"{key!r} ({shown(unknown[key])})" for key in sorted(unknown))
        raise ValueError(
            f"The rotary embedding of type {kind!r} has no {listed}, which `{name}` of config.json "
            "holds. Name the intended type as `rope_type`, or remove these settings."
        )


def read_whole_rotary(values: Mapping[str, Any], **form: Any) -> Rotary:
    """Does what `read_rotary` does, for a family that always rotates the whole of each head.

    **Raises:**

    `ValueError` as `read_rotary`, and if only a part is to be rotated.
    """
    rotary = read_rotary(values, **form)
    if rotary.fraction != 1 and rotary.kind != "proportional":
        raise ValueError(
            f"`partial_rotary_factor` must be 1 in the family {values['model_type']!r}; got "
            f"{rotary.fraction}. `transformers` rotates whole heads nevertheless. Remove the key "
            "from config.json if that is what the model was trained with."
        )
    return rotary


def write_rotary(rotary: Rotary | None, *, partial: bool = False) -> dict[str, Any]:
    """The inverse of `read_rotary`: the keys, in the older and the newer form.

    If `partial`, the rotated fraction is written even if it is 1, since the family has another
    default.
    """
    if rotary is None:
        return {}
    common: dict[str, Any] = {"rope_theta": rotary.theta}
    if partial or rotary.fraction != 1:
        common["partial_rotary_factor"] = rotary.fraction
    parameters = {**rope_parameters(rotary), **common}
    older = parameters if rotary.kind != "default" else None
    return {**common, "rope_scaling": older, "rope_parameters": parameters}


def rope_parameters(rotary: Rotary) -> dict[str, Any]:
    """The type, the base and the settings of rotary embeddings."""
    settings = {"rope_type": rotary.kind, "rope_theta": rotary.theta}
    return {**settings, **_WRITE[rotary.kind](rotary)}


def _either(first: Mapping, second: Mapping, key: str, default: float) -> float | int:
    value = first.get(key)
    value = second.get(key) if value is None else value
    return default if value is None else value


def _read_llama3(scaling: Mapping[str, Any], length: int, longest: int) -> dict[str, Any]:
    return {
        "factor": float(scaling["factor"]),
        "low_frequency": float(scaling["low_freq_factor"]),
        "high_frequency": float(scaling["high_freq_factor"]),
        "original_length": length,
    }


def _read_yarn(scaling: Mapping[str, Any], length: int, longest: int) -> dict[str, Any]:
    stated = scaling["factor"]
    factor = longest / length if stated is None else float(stated)
    amplitude = scaling.get("attention_factor")
    return {
        "factor": factor,
        "slow": float(scaling.get("beta_slow") or 1),
        "fast": float(scaling.get("beta_fast") or 32),
        # `transformers` reads null as false, and a missing key as true.
        "truncate": bool(scaling.get("truncate", True)),
        "original_length": length,
        "amplitude": _amplitude(scaling, factor) if amplitude is None else float(amplitude),
    }


def _amplitude(scaling: Mapping[str, Any], factor: float) -> float:
    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return of(over) / of(under) if over and under else of(1.0)


def _read_longrope(scaling: Mapping[str, Any], length: int, longest: int) -> dict[str, Any]:
    stated, amplitude = scaling.get("factor"), scaling.get("attention_factor")
    factor = longest / length if stated is None else float(stated)
    # The default of `transformers`.
    grown = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    return {
        "factor": factor,
        "original_length": length,
        "amplitude": grown if amplitude is None else float(amplitude),
        "short_factors": tuple(map(float, scaling["short_factor"])),
        "long_factors": tuple(map(float, scaling["long_factor"])),
    }


def _read_dynamic(scaling: Mapping[str, Any], length: int, longest: int) -> dict[str, Any]:
    return {"factor": float(scaling["factor"]), "original_length": longest}


_READ = {
    "default": lambda scaling, length, longest: {},
    "linear": lambda scaling, length, longest: {"factor": float(scaling["factor"])},
    "proportional": lambda scaling, length, longest: {
        "factor": float(_either(scaling, {}, "factor", 1.0))
    },
    "dynamic": _read_dynamic,
    "longrope": _read_longrope,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}

_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "proportional": (),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_OPTIONAL = {
    "proportional": ("factor",),
    "longrope": ("factor", "attention_factor"),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
# `finetuned` says that the model was trained with the scaling; it has no effect.
_COMMON = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
    *("original_max_position_embeddings", "finetuned"),
)
_ROPE_KINDS = {
    **dict.fromkeys(["rope_type", "type"], optional(TEXT)),
    **dict.fromkeys(["factor", "low_freq_factor", "high_freq_factor"], optional(POSITIVE)),
    **dict.fromkeys(["attention_factor", "beta_fast", "beta_slow"], optional(NOT_NEGATIVE)),
    **dict.fromkeys(["mscale", "mscale_all_dim"], optional(NUMBER)),
    "truncate": optional(FLAG),
    **dict.fromkeys(["short_factor", "long_factor"], optional(POSITIVES)),
    "rope_theta": KINDS_OF_CONFIG["rope_theta"],
    "partial_rotary_factor": KINDS_OF_CONFIG["partial_rotary_factor"],
    "original_max_position_embeddings": KINDS_OF_CONFIG["original_max_position_embeddings"],
}

_WRITE = {
    "default": lambda rotary: {},
    "linear": lambda rotary: {"factor": rotary.factor},
    "proportional": lambda rotary: {"factor": rotary.factor},
    "dynamic": lambda rotary: {"factor": rotary.factor},
    "longrope": lambda rotary: {
        "factor": rotary.factor,
        "short_factor": list(rotary.short_factors),
        "long_factor": list(rotary.long_factors),
        "attention_factor": rotary.amplitude,
        "original_max_position_embeddings": rotary.original_length,
    },
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
