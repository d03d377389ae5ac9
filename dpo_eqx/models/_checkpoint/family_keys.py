"""Reads and writes the keys of each family's `config.json` that need more than a table.

Each `read_` takes all keys, with defaults filled in, and returns fields of `Config`. Each `write_`
takes a `Config` and returns keys. Settings that are not supported raise here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .._decoder.config import Config
from .rotary_keys import read_rotary, read_whole_rotary, write_rotary

Values = Mapping[str, Any]

_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_llama(values: Values) -> dict[str, Any]:
    """Llama: one key decides all biases of attention."""
    bias = values["attention_bias"]
    return {
        "query_bias": bias,
        "output_bias": bias,
        "feed_forward_bias": values["mlp_bias"],
        "rotary": read_whole_rotary(values),
    }


def write_llama(config: Config) -> dict[str, Any]:
    """The inverse of `read_llama`."""
    return {
        "attention_bias": config.query_bias,
        "mlp_bias": config.feed_forward_bias,
        **write_rotary(config),
    }


def read_mistral(values: Values) -> dict[str, Any]:
    """Mistral: one window for all layers, or as `layer_types` says (Ministral)."""
    window = values["sliding_window"]
    types = (
        values["layer_types"]
        or [_FULL if window is None else _SLIDING] * values["num_hidden_layers"]
    )
    return {"windows": read_windows(types, window, values), "rotary": read_whole_rotary(values)}


def write_mistral(config: Config) -> dict[str, Any]:
    """The inverse of `read_mistral`."""
    # Programs that do not know `layer_types` read the window alone.
    is_mixed = len(set(config.windows)) > 1
    windows = write_windows(config) if is_mixed else {"sliding_window": config.windows[0]}
    return {**windows, **write_rotary(config)}


def read_qwen(values: Values) -> dict[str, Any]:
    """Qwen 2: windows from layer `max_window_layers` on, or as `layer_types` says."""
    window = values["sliding_window"] if values["use_sliding_window"] else None
    first = values["max_window_layers"]
    types = values["layer_types"] or [
        _SLIDING if window is not None and layer >= first else _FULL
        for layer in range(values["num_hidden_layers"])
    ]
    return {"windows": read_windows(types, window, values), "rotary": read_whole_rotary(values)}


def write_qwen(config: Config) -> dict[str, Any]:
    """The inverse of `read_qwen`."""
    first = next((i for i, window in enumerate(config.windows) if window), config.layers)
    return {
        **write_windows(config),
        "use_sliding_window": first < config.layers,
        # For older programs, which do not know `layer_types`.
        "max_window_layers": first,
        **write_rotary(config),
    }


def read_qwen3(values: Values) -> dict[str, Any]:
    """Qwen 3: as Qwen 2, with optional biases."""
    bias = values["attention_bias"]
    return {"query_bias": bias, "output_bias": bias, **read_qwen(values)}


def write_qwen3(config: Config) -> dict[str, Any]:
    """The inverse of `read_qwen3`."""
    return {"attention_bias": config.query_bias, **write_qwen(config)}


def read_gemma2(values: Values) -> dict[str, Any]:
    """Gemma 2: windows in every other layer, and its own scales of scores and embeddings."""
    refuse(values, "use_bidirectional_attention")
    types = values["layer_types"] or [
        _FULL if layer % 2 else _SLIDING for layer in range(values["num_hidden_layers"])
    ]
    bias = values["attention_bias"]
    return {
        "windows": read_windows(types, values["sliding_window"], values),
        "query_bias": bias,
        "output_bias": bias,
        "attention_scale": values["query_pre_attn_scalar"] ** -0.5,
        "embedding_scale": values["hidden_size"] ** 0.5,
        "rotary": read_whole_rotary(values),
    }


def write_gemma2(config: Config) -> dict[str, Any]:
    """The inverse of `read_gemma2`."""
    scalar = config.attention_scale**-2
    return {
        **write_windows(config),
        "attention_bias": config.query_bias,
        # A whole number is written as an integer, which `transformers` declares.
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        **write_rotary(config),
    }


def read_gpt2(values: Values) -> dict[str, Any]:
    """GPT-2: the scores may be unscaled."""
    refuse(values, "scale_attn_by_inverse_layer_idx")
    refuse(values, "add_cross_attention")
    return {} if values["scale_attn_weights"] else {"attention_scale": 1.0}


def write_gpt2(config: Config) -> dict[str, Any]:
    """The inverse of `read_gpt2`."""
    return {"scale_attn_weights": config.attention_scale != 1}


def read_phi(values: Values) -> dict[str, Any]:
    """Phi: a part of each head is rotated, by default half."""
    fraction = values["partial_rotary_factor"] or 0.5
    return {"rotary": read_rotary({**values, "partial_rotary_factor": fraction})}


def write_phi(config: Config) -> dict[str, Any]:
    """The inverse of `read_phi`."""
    return write_rotary(config)


def read_windows(
    types: Sequence[str], window: int | None, values: Values
) -> tuple[int | None, ...]:
    """The window of each layer, from its type; `values` holds the number of layers."""
    # Older files write "attention" for full attention.
    types = [_FULL if kind == "attention" else kind for kind in types]
    unknown = set(types) - {_SLIDING, _FULL}
    if unknown:
        raise ValueError(
            f"`layer_types` may hold {_SLIDING!r} and {_FULL!r}; got {sorted(unknown)} too, "
            "which is not supported."
        )
    if len(types) != values["num_hidden_layers"]:
        raise ValueError(
            f"`layer_types` must have one entry per layer, and `num_hidden_layers` says "
            f"{values['num_hidden_layers']}; got {len(types)}."
        )
    if window is None and _SLIDING in types:
        raise ValueError(
            f"`layer_types` has layers of {_SLIDING!r}, which need a positive integer as "
            "`sliding_window`; it is null, or `use_sliding_window` is false."
        )
    return tuple(window if kind == _SLIDING else None for kind in types)


def write_windows(config: Config) -> dict[str, Any]:
    """The keys for `config.windows`."""
    window = next((window for window in config.windows if window is not None), None)
    types = [_FULL if window is None else _SLIDING for window in config.windows]
    return {"layer_types": types, "sliding_window": window}


def refuse(values: Values, key: str) -> None:
    """Raises if `key` is set, since its feature is not supported."""
    if values[key]:
        raise ValueError(f"`{key}` in config.json is {values[key]!r}; that is not supported.")
