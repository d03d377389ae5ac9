"""The language model inside a checkpoint that holds more, such as a vision tower.

It is read as a checkpoint of its own: its part of `config.json`, and its tensors under their plain
names. `transformers` writes such folders as `*ForConditionalGeneration`.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from .._decoder.companion_files import Origin
from .config_values import shown
from .folder import Weights

# The outer `model_type`, and the inner one if the file does not say it.
_OUTER = {"gemma3": "gemma3_text", "mistral3": "mistral", "qwen3_5": "qwen3_5_text"}
# Whether embeddings are tied if the outer configuration does not say it (default: yes).
_TIED = {"qwen3_5": False}
# Keys that the outer configuration decides if it has them.
_OUTER_KEYS = ("quantization_config", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id")
# The same language model, as newer and as older versions of `transformers` name it.
_PREFIX = re.compile(r"^(model\.language_model\.|language_model\.(model\.)?)")
_OTHER_PARTS = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector|visual)\.")
# Files about images, which a language model alone does not take.
_IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")


def is_outer(values: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes more than a language model."""
    return values.get("model_type") in _OUTER


def inner_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of the language model, or all keys if the checkpoint is one.

    **Raises:**

    `ValueError` if `text_config` is missing.
    """
    if not is_outer(values):
        return values
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(
            f"`text_config` must hold the keys of the language model, since `model_type` is "
            f"{values['model_type']!r}; got {shown(text)}."
        )
    # `transformers` ties by the outer key alone.
    default = _TIED.get(values["model_type"], True)
    tied = {"tie_word_embeddings": values.get("tie_word_embeddings", default)}
    outer = {key: values[key] for key in _OUTER_KEYS if key in values}
    return {"model_type": _OUTER[values["model_type"]], **text, **tied, **outer}


def inner_origin(origin: Origin) -> Origin:
    """The origin of the language model: without the files about images."""
    if not is_outer(origin.config):
        return origin
    files = {name: file for name, file in origin.files.items() if name not in _IMAGE_FILES}
    return Origin(files, inner_config(origin.config), origin.config["model_type"])


def keep_language_model(weights: Weights, front: str = "") -> str:
    """Keeps only the language model's tensors, under plain names; a warning counts the rest.

    **Arguments:**

    - `weights`: the tensors of a checkpoint, or of an adapter.
    - `front`: what stands in front of each name, also of the plain ones.

    **Returns:**

    What the names had in place of `model.`; `""` if they were plain.
    """
    others = _leave_out(weights, _OTHER_PARTS, front)
    prefix = ""
    for name in list(weights.shapes):
        if match := _PREFIX.match(name.removeprefix(front)):
            plain = name.removeprefix(front)[match.end() :]
            plain = plain if plain.startswith("lm_head.") else f"model.{plain}"
            weights.rename(name, front + plain)
            prefix = max(prefix, match[0], key=len)
    if others:
        warnings.warn(
            f"{weights.folder} holds a language model and {len(others)} tensors of other parts, "
            f"such as {min(others)}. Only the language model is loaded.",
            stacklevel=3,
        )
    return prefix


def outer_name(name: str) -> str:
    """The name of a module of the language model in the whole checkpoint, in the newer form."""
    return re.sub(r"^model\.", "model.language_model.", name)


def leave_out_heads(weights: Weights, pattern: str) -> None:
    """Leaves out the heads that predict further tokens; a warning counts their tensors.

    **Arguments:**

    - `weights`: the tensors of the checkpoint.
    - `pattern`: a regular expression, searched in the names of tensors.
    """
    heads = _leave_out(weights, re.compile(pattern))
    if heads:
        warnings.warn(
            f"{weights.folder} has {len(heads)} tensors of heads that predict further tokens, such "
            f"as {min(heads)}. They are not loaded.",
            stacklevel=3,
        )


def _leave_out(weights: Weights, pattern: re.Pattern[str], front: str = "") -> list[str]:
    """Leaves out the tensors whose name matches behind `front`; returns their names."""
    names = [name for name in weights.shapes if pattern.search(name.removeprefix(front))]
    for name in names:
        weights.drop(name)
    return names
