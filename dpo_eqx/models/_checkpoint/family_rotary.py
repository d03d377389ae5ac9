"""The traits of families that write their rotary embeddings in their own way.

The common keys are in `rotary_keys.py`, and embeddings that differ by layer in `family_layers.py`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from .._decoder.config import Config, Rotary
from .config_values import (
    NOT_NEGATIVE,
    POSITIVE,
    SIZE,
    check_kinds,
)
from .family import Trait, Values
from .rotary_keys import read_rotary, read_whole_rotary, write_rotary

_LENGTH = {"original_max_position_embeddings": SIZE}


def read_phi3(values: Values) -> dict[str, Any]:
    """Phi 3: none but `longrope`, for which older files have other names."""
    scaling = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    kind = "longrope" if kind in ("su", "yarn") else kind
    if kind not in ("default", "longrope"):
        raise ValueError(
            "The rotary embedding of the family 'phi3' must be of the type 'default' or "
            f"'longrope'; got {kind!r}, which is not supported."
        )
    parameters = {**scaling, "rope_type": kind}
    return {"rotary": read_rotary({**values, "rope_scaling": None, "rope_parameters": parameters})}


def write_phi3(config: Config) -> dict[str, Any]:
    """The inverse of `read_phi3`."""
    original = config.rotary.original_length if config.rotary else 0
    # This key has priority over the one in `rope_parameters`.
    length = {"original_max_position_embeddings": original or config.max_length}
    return {**write_rotary(config.rotary, partial=True), **length}


PHI3 = Trait(read_phi3, write_phi3)


def read_gpt_neox(values: Values) -> dict[str, Any]:
    """GPT-NeoX: other names for the base and for the rotated fraction."""
    names = {"rope_theta": values["rotary_emb_base"], "partial_rotary_factor": values["rotary_pct"]}
    return {"rotary": read_rotary({**values, **names})}


def write_gpt_neox(config: Config) -> dict[str, Any]:
    """The inverse of `read_gpt_neox`."""
    keys = write_rotary(config.rotary, partial=True)
    return {
        **keys,
        "rotary_emb_base": keys["rope_theta"],
        "rotary_pct": keys["partial_rotary_factor"],
    }


GPT_NEOX = Trait(read_gpt_neox, write_gpt_neox)


def read_gptj(values: Values) -> dict[str, Any]:
    """GPT-J and CodeGen: the rotated width, of which neighbours are rotated against each other."""
    head, width = values["n_embd"] // values["n_head"], values["rotary_dim"]
    if width > head or width % 2:
        raise ValueError(
            "`rotary_dim` in config.json must be even, and at most the width of a head, "
            f"{head}; got {width}."
        )
    fraction = width / head
    while int(head * fraction) < width:
        fraction = math.nextafter(fraction, 2)
    return {"rotary": Rotary(fraction=fraction, interleaved=True)}


def write_gptj(config: Config) -> dict[str, Any]:
    """The inverse of `read_gptj`."""
    rotary = config.rotary
    return {"rotary_dim": rotary.rotated_width(config.head_width)} if rotary else {}


GPTJ = Trait(read_gptj, write_gptj)


def with_default(parameters: Values) -> Callable[[Values], Values]:
    """A function that fills in the rotary embeddings of a file that has none."""

    def filled(values: Values) -> Values:
        has_any = values.get("rope_scaling") or values.get("rope_parameters")
        return values if has_any else {**values, "rope_parameters": parameters}

    return filled


_APERTUS = with_default(
    {
        "rope_type": "llama3",
        "rope_theta": 12000000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
)
APERTUS = Trait(
    lambda values: {"rotary": read_whole_rotary(_APERTUS(values))},
    lambda config: write_rotary(config.rotary),
)

_MINISTRAL3 = with_default(
    {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.1,
    }
)
_GROWTH = "llama_4_scaling_beta"


def read_ministral3(values: Values) -> dict[str, Any]:
    """Ministral 3: queries grow with their position."""
    values = _MINISTRAL3(values)
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    scaling = dict(values[name])
    # It repeats the key of the same name outside.
    scaling.pop("max_position_embeddings", None)
    growth = scaling.pop(_GROWTH, None)
    check_kinds({_GROWTH: growth}, {_GROWTH: NOT_NEGATIVE}, f"`{name}` of config.json")
    original = scaling.get("original_max_position_embeddings")
    check_kinds({"original_max_position_embeddings": original}, _LENGTH, f"`{name}` of config.json")
    rotary = read_whole_rotary({**values, name: scaling}, query_growth=float(growth))
    return {"rotary": dataclasses.replace(rotary, original_length=original)}


def write_ministral3(config: Config) -> dict[str, Any]:
    """The inverse of `read_ministral3`."""
    rotary, keys = config.rotary, write_rotary(config.rotary)
    if rotary is None:
        return keys
    own = {
        _GROWTH: rotary.query_growth,
        "original_max_position_embeddings": rotary.original_length,
    }
    parameters = {**keys["rope_parameters"], **own}
    # The newer form alone, since older programs do not know the growth.
    return {"rope_theta": rotary.theta, "rope_parameters": parameters}


MINISTRAL3 = Trait(read_ministral3, write_ministral3)


def read_hunyuan(values: Values) -> dict[str, Any]:
    """Hunyuan: a `dynamic` scaling with an `alpha` is a larger base, for rows of any length."""
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    alpha = scaling.get("alpha")
    if scaling.get("rope_type", scaling.get("type")) != "dynamic" or not alpha:
        return {"rotary": read_whole_rotary(values)}
    check_kinds({"alpha": alpha}, {"alpha": POSITIVE}, "the rotary embedding of config.json")
    width = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    theta = scaling.get("rope_theta") or values.get("rope_theta") or 10000.0
    return {"rotary": Rotary(theta=theta * alpha ** (width / (width - 2)))}


HUNYUAN = Trait(read_hunyuan, lambda config: write_rotary(config.rotary))
