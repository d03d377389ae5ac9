"""Reads a `config.json` into a `Config` and writes it back, by the families' tables.

Neither touches a file: reading takes the parsed contents, and writing returns them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._decoder.basic_layers import ACTIVATIONS
from .._decoder.config import Config
from .config_keys import check_unread
from .config_values import KINDS, check_kinds
from .families import FAMILIES, Family
from .language_model import inner_config


def family_of(values: Mapping[str, Any]) -> Family:
    """The family of a configuration, by its `model_type`.

    **Raises:**

    `ValueError` if the family is unknown; the error lists the known ones.
    """
    name = values.get("model_type")
    if name not in FAMILIES:
        raise ValueError(
            f"`model_type` must be one of {sorted(FAMILIES)}; got {name!r}. Give a checkpoint of "
            "one of these families, or use another network from Python, by `dpx.adapt`."
        )
    return FAMILIES[name]


def read_config(values: Mapping[str, Any]) -> Config:
    """The configuration that the contents of a `config.json` describe.

    Missing keys get the defaults of `transformers`.

    ```python
    config = models.read_config({"model_type": "qwen3", "hidden_size": 1024, ...})
    ```

    **Arguments:**

    - `values`: the parsed `config.json`, with the older or the newer names of keys. If it has a
        `text_config`, as Gemma 3 with images does, that is the one that counts.

    **Raises:**

    `ValueError` if the family is unknown (the error lists the known ones), a value has the wrong
    type, a setting is not supported, or a key that the family does not read may change the logits.
    Keys that cannot change the logits (training, generation, labels) are ignored.
    """
    values = inner_config(values)
    family = family_of(values)
    check_not_quantised(values.get("quantization_config"))
    read = family.reads()
    check_kinds({key: values[key] for key in sorted(values.keys() & read)}, KINDS, "config.json")
    # If both names are present, the alias wins, as in `transformers`.
    aliases = {key: values[a] for a, key in family.aliases().items() if a in values}
    settings = {**family.defaults, **values, **aliases}
    fields = {field: settings[key] for key, field in family.keys.items()}
    fields = {**fields, **family.fixed}
    check_activation(fields["activation"], family)
    fields = {**fields, **family.read(settings), "family": values["model_type"]}
    try:
        config = Config(**{name: _plain(name, value) for name, value in fields.items()})
    except ValueError as error:
        raise ValueError(_in_keys(str(error), family)) from None
    check_unread(values, read, family.neutral, config)
    return config


def check_not_quantised(settings: Any) -> None:
    """Raises if the weights are stored quantised; the error says how to convert them."""
    if not settings:
        return
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    way = (
        "`transformers` converts them: load the model with "
        "`quantization_config=Mxfp4Config(dequantize=True)` and `dtype=torch.bfloat16`, and save it"
        if method == "mxfp4"
        else "Save the model with its weights in float32, float16 or bfloat16"
    )
    raise ValueError(
        "`quantization_config`: quantised checkpoints are not supported"
        f"{f'; the method is {method!r}' if method else ''}. {way}."
    )


def check_activation(activation: Any, family: Family) -> None:
    """Raises if the family has no such activation."""
    trained = {"xielu"} if "layers.feed_forward.activation" in family.names else set()
    known = ACTIVATIONS.keys() | trained
    if activation not in known:
        raise ValueError(f"The activation must be one of {sorted(known)}; got {activation!r}.")


def write_config(config: Config) -> dict[str, Any]:
    """The contents of a `config.json` that `read_config` and `transformers` read as `config`.

    **Raises:**

    `ValueError` if the family's `config.json` has no key for a setting of `config`.
    """
    family = FAMILIES[config.family]
    values = {
        "model_type": config.family,
        "architectures": [family.architecture],
        **{key: getattr(config, field) for key, field in family.keys.items()},
        **family.write(config),
    }
    # Read back what was written: a setting that the family cannot store shows as a difference.
    how_it_runs = ("dropout", "remat", "unroll", "fused")
    again = dataclasses.replace(
        read_config(values), **{name: getattr(config, name) for name in how_it_runs}
    )
    lost = [
        f"`{field.name}` ({getattr(config, field.name)!r})"
        for field in dataclasses.fields(config)
        if getattr(again, field.name) != getattr(config, field.name)
    ]
    if lost:
        raise ValueError(f"Checkpoints of {config.family!r} cannot store {', '.join(lost)}.")
    return values


def _in_keys(message: str, family: Family) -> str:
    """An error about fields of `Config`, with the names of the keys that they were read from."""
    for key, field in family.keys.items():
        message = message.replace(f"`{field}`", f"`{key}`")
    return message


_FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def _plain(name: str, value: Any) -> Any:
    """A JSON value in the field's type: null becomes the default, whole numbers become floats."""
    default = _FIELDS[name].default
    if value is None and _FIELDS[name].type in (int, float):
        return default
    return float(value) if isinstance(default, float) and isinstance(value, int) else value
