"""The traits of families whose rotary embeddings differ by layer, together with their windows.

Embeddings that are the same in all layers are in `family_rotary.py`.
"""

from collections.abc import Mapping
from typing import Any

from .._decoder.config import Config, Rotary
from .config_values import OBJECT, check_kinds, optional, shown
from .family import Trait, Values
from .family_keys import FULL, SLIDING, read_windows, types_by_period, types_of, write_windows
from .rotary_keys import read_whole_rotary, rope_parameters, write_rotary


def in_some_layers(
    rotary: Rotary, rotates: list[bool] | tuple[bool, ...]
) -> tuple[Rotary | None, ...]:
    """The rotary embeddings of each layer, `None` if the layer does not rotate."""
    return tuple(rotary if is_rotated else None for is_rotated in rotates)


def read_smollm3(values: Values) -> dict[str, Any]:
    """SmolLM 3: no rotation in some layers, which may have windows."""
    layers, interval = values["num_hidden_layers"], values["no_rope_layer_interval"]
    switches = values["no_rope_layers"]
    if switches is None:
        switches = [int(layer % interval != 0) for layer in range(1, layers + 1)]
    if len(switches) < layers:
        raise ValueError(
            f"`no_rope_layers` in config.json must have one entry per layer, {layers}; got "
            f"{len(switches)}."
        )
    rotates = [bool(switch) for switch in switches[:layers]]
    window = values["sliding_window"]
    slides = values["use_sliding_window"] and window is not None
    types = values["layer_types"] or [
        SLIDING if slides and not is_rotated else FULL for is_rotated in rotates
    ]
    rotary = read_whole_rotary(values)
    return {
        "rotary": rotary,
        "rotaries": in_some_layers(rotary, rotates),
        "windows": read_windows(types, window, values),
    }


def write_smollm3(config: Config) -> dict[str, Any]:
    """The inverse of `read_smollm3`."""
    windows = write_windows(config)
    return {
        **windows,
        "use_sliding_window": windows["sliding_window"] is not None,
        "no_rope_layers": [int(rotary is not None) for rotary in config.layer_rotaries],
        **write_rotary(config.rotary),
    }


SMOLLM3 = Trait(read_smollm3, write_smollm3)


def rotary_in_windows(period: int, *, whole: bool, **form: Any) -> Trait:
    """Windows by a pattern, and rotation only in the layers that have a window.

    **Arguments:**

    - `period`: the default of `sliding_window_pattern`.
    - `whole`: whether all layers rotate if none can have a window.
    - `form`: fields of `Rotary` that the family fixes.
    """

    def read(values: Values) -> dict[str, Any]:
        window, types = values["sliding_window"], values["layer_types"]
        if types is None and whole and window is None:
            types = [FULL] * values["num_hidden_layers"]
        if types is None:
            types = types_by_period(values["sliding_window_pattern"], values)
        windows = read_windows(types, window, values)
        rotary = read_whole_rotary(values, **form)
        everywhere = whole and window is None
        rotates = [everywhere or own is not None for own in windows]
        return {
            "windows": windows,
            "rotary": rotary,
            "rotaries": in_some_layers(rotary, rotates),
        }

    def write(config: Config) -> dict[str, Any]:
        windows = write_windows(config)
        if windows["sliding_window"] is None and None in config.layer_rotaries:
            # A window that no layer has: it says that full layers do not rotate.
            windows["sliding_window"] = config.max_length
        return {**windows, "sliding_window_pattern": period, **write_rotary(config.rotary)}

    return Trait(read, write)


COHERE2 = rotary_in_windows(4, whole=False, interleaved=True)
EXAONE4 = rotary_in_windows(4, whole=True)


def rotary_by_type(theta: float, sliding_theta: float, sliding_key: str | None) -> Trait:
    """Rotary embeddings by the type of a layer, full attention or a window, as `layer_types` says.

    In newer files `rope_parameters` has both by name. In older files `rope_theta` and
    `rope_scaling` are for full attention alone.

    **Arguments:**

    - `theta`, `sliding_theta`: the default bases.
    - `sliding_key`: the key of older files for the base with a window, if there is one.
    """

    def read(values: Values) -> dict[str, Any]:
        newer = values.get("rope_parameters") or {}
        check_nested(newer)
        check_older(values)
        older = {"rope_theta": values.get("rope_theta") or theta}
        full = {**older, **_given(newer.get(FULL)), **_given(values.get("rope_scaling"))}
        base = values.get(sliding_key) if sliding_key else None
        sliding = {"rope_theta": base or sliding_theta, **_given(newer.get(SLIDING))}
        rotaries = [_read_one(settings, newer, values) for settings in (full, sliding)]
        return {
            "rotary": rotaries[0],
            "rotaries": tuple(rotaries[kind == SLIDING] for kind in types_of(values)),
        }

    def write(config: Config) -> dict[str, Any]:
        full = config.rotary or Rotary()
        pairs = zip(config.layer_rotaries, config.windows, strict=True)
        with_window = (rotary for rotary, window in pairs if rotary and window is not None)
        sliding = next(with_window, Rotary(theta=sliding_theta))
        keys = {sliding_key: sliding.theta} if sliding_key else {}
        nested = {FULL: rope_parameters(full), SLIDING: rope_parameters(sliding)}
        return {**write_rotary(full), **keys, "rope_parameters": nested}

    return Trait(read, write)


def check_older(values: Values) -> None:
    """Raises if `rope_scaling` names its type in a way that `transformers` ignores here."""
    scaling = values.get("rope_scaling") or {}
    kind = scaling.get("type")
    if scaling.get("rope_type") is None and kind not in (None, "default"):
        raise ValueError(
            f"`rope_scaling` in config.json has `type` {kind!r}, which `transformers` ignores in "
            f"the family {values['model_type']!r}. Name it `rope_type` if the model was trained "
            "with it, and remove `rope_scaling` otherwise."
        )


def check_nested(parameters: Mapping[str, Any]) -> None:
    """Raises if `rope_parameters` does not name the types of layers."""
    if parameters and not {FULL, SLIDING} & parameters.keys():
        raise ValueError(
            f"`rope_parameters` in config.json must have the keys {FULL!r} and {SLIDING!r}, each "
            f"with the rotary embeddings of these layers; got {shown(dict(parameters))}."
        )
    check_kinds(parameters, dict.fromkeys((FULL, SLIDING), optional(OBJECT)), "`rope_parameters`")


def _given(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (settings or {}).items() if value is not None}


def _read_one(settings: Values, outer: Values, values: Values) -> Rotary:
    """One type's rotary embeddings; `transformers` reads `truncate` beside the types' names."""
    settings = {key: value for key, value in settings.items() if key != "truncate"}
    if settings.get("rope_type", settings.get("type")) == "yarn":
        settings["truncate"] = outer.get("truncate", True)
    # A nested form has its own original length.
    alone = {"rope_scaling": None, "original_max_position_embeddings": None}
    return read_whole_rotary({**values, **alone, "rope_parameters": settings})


GEMMA3 = rotary_by_type(1e6, 1e4, "rope_local_base_freq")
OLMO3 = rotary_by_type(5e5, 5e5, None)
