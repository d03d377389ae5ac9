"""The traits of families: keys of `config.json` that need more than a table, read and written.

A trait's `read` takes all keys, with defaults filled in, and returns fields of `Config`. Its
`write` takes a `Config` and returns keys. Settings that are not supported raise here.
"""

import math
from collections.abc import Sequence
from typing import Any

from .._decoder.config import Config
from .family import Trait, Values
from .rotary_keys import read_rotary, read_whole_rotary, write_rotary

SLIDING, FULL = "sliding_attention", "full_attention"


def same_for(key: str, *fields: str) -> Trait:
    """A key that decides several fields; its table says which one it is written from."""
    return Trait(lambda values: dict.fromkeys(fields, bool(values[key])), lambda config: {})


def same_for_number(key: str, field: str) -> Trait:
    """A number that two fields share; its table says which one it is written from."""
    return Trait(lambda values: {field: values[key]}, lambda config: {})


OUTPUT_BIAS = same_for("attention_bias", "output_bias")
"""One key decides all biases of attention."""


def rotary(*, partial: bool = False, **form: Any) -> Trait:
    """Rotary embeddings of one kind for all layers.

    **Arguments:**

    - `partial`: whether the family can rotate a part of each head.
    - `form`: fields of `Rotary` that the family fixes.
    """
    read = read_rotary if partial else read_whole_rotary
    return Trait(
        lambda values: {"rotary": read(values, **form)},
        lambda config: write_rotary(config.rotary, partial=partial),
    )


ROTARY, PARTIAL_ROTARY = rotary(), rotary(partial=True)


def half_rotary(fraction: float) -> Trait:
    """Partial rotary embeddings in which null stands for the family's own fraction."""

    def read(values: Values) -> dict[str, Any]:
        own = values["partial_rotary_factor"] or fraction
        return {"rotary": read_rotary({**values, "partial_rotary_factor": own})}

    return Trait(read, PARTIAL_ROTARY.write)


def even_rotation(trait: Trait) -> Trait:
    """A trait of rotary embeddings whose family only rotates an even part of each head.

    In other families an odd part is rounded up.
    """

    def read(values: Values) -> dict[str, Any]:
        fields = trait.read(values)
        head = values["hidden_size"] // values["num_attention_heads"]
        rotary = fields["rotary"]
        if rotary.stated_width(head) % 2:
            raise ValueError(
                "`partial_rotary_factor` in config.json must be the fraction of an even part of "
                f"each head in the family {values['model_type']!r}; got {rotary.fraction} of "
                f"{head}."
            )
        return fields

    return Trait(read, trait.write)


def multiple_of(count: int, key: str) -> Trait:
    """A size that must be a multiple of a number."""

    def read(values: Values) -> dict[str, Any]:
        if values[key] % count:
            raise ValueError(
                f"`{key}` in config.json must be a multiple of {count} in the family "
                f"{values['model_type']!r}; got {values[key]}."
            )
        return {}

    return Trait(read, lambda config: {})


def refusing(*keys: str) -> Trait:
    """Keys whose feature is not supported."""

    def read(values: Values) -> dict[str, Any]:
        for key in keys:
            refuse(values, key)
        return {}

    return Trait(read, lambda config: {})


def refuse(values: Values, key: str) -> None:
    """Raises if `key` is set, since its feature is not supported."""
    if values[key]:
        raise ValueError(f"`{key}` in config.json is {values[key]!r}; that is not supported.")


def read_windows(
    types: Sequence[str], window: int | None, values: Values
) -> tuple[int | None, ...]:
    """The window of each layer, from its type; `values` holds the number of layers."""
    # Older files write "attention" for full attention.
    types = [FULL if kind == "attention" else kind for kind in types]
    unknown = set(types) - {SLIDING, FULL}
    if unknown:
        raise ValueError(
            f"`layer_types` may hold {SLIDING!r} and {FULL!r}; got {sorted(unknown)} too, "
            "which is not supported."
        )
    if len(types) != values["num_hidden_layers"]:
        raise ValueError(
            f"`layer_types` must have one entry per layer, and `num_hidden_layers` says "
            f"{values['num_hidden_layers']}; got {len(types)}."
        )
    if window is None and SLIDING in types:
        raise ValueError(
            f"`layer_types` has layers of {SLIDING!r}, which need a positive integer as "
            "`sliding_window`; it is null, or `use_sliding_window` is false."
        )
    return tuple(window if kind == SLIDING else None for kind in types)


def write_windows(config: Config) -> dict[str, Any]:
    """The keys for `config.windows`."""
    window = next((window for window in config.windows if window is not None), None)
    types = [FULL if window is None else SLIDING for window in config.windows]
    return {"layer_types": types, "sliding_window": window}


def write_some_window(config: Config) -> dict[str, Any]:
    """The keys for `config.windows` in families for which `transformers` needs a window.

    If no layer has one, it is a window that takes no effect.
    """
    keys = write_windows(config)
    window = keys["sliding_window"]
    return {**keys, "sliding_window": config.max_length if window is None else window}


def one_window(values: Values) -> dict[str, Any]:
    """One window for all layers."""
    return {"windows": (values["sliding_window"],) * values["num_hidden_layers"]}


ONE_WINDOW = Trait(one_window, lambda config: {"sliding_window": config.windows[0]})
"""Mistral and others: one window for all layers, or none."""


def read_mistral(values: Values) -> dict[str, Any]:
    """Mistral: one window for all layers, or as `layer_types` says (Ministral)."""
    window = values["sliding_window"]
    types = (
        values["layer_types"] or [FULL if window is None else SLIDING] * values["num_hidden_layers"]
    )
    return {"windows": read_windows(types, window, values)}


def write_mistral(config: Config) -> dict[str, Any]:
    """The inverse of `read_mistral`."""
    # Programs that do not know `layer_types` read the window alone.
    is_mixed = len(set(config.windows)) > 1
    return write_windows(config) if is_mixed else {"sliding_window": config.windows[0]}


MISTRAL_WINDOWS = Trait(read_mistral, write_mistral)
MINISTRAL_WINDOWS = Trait(read_mistral, write_some_window)


def read_qwen(values: Values) -> dict[str, Any]:
    """Qwen 2: windows from layer `max_window_layers` on, or as `layer_types` says."""
    window = values["sliding_window"] if values["use_sliding_window"] else None
    first = values["max_window_layers"]
    types = values["layer_types"] or [
        SLIDING if window is not None and layer >= first else FULL
        for layer in range(values["num_hidden_layers"])
    ]
    return {"windows": read_windows(types, window, values)}


def write_qwen(config: Config) -> dict[str, Any]:
    """The inverse of `read_qwen`."""
    first = next((i for i, window in enumerate(config.windows) if window), config.layers)
    return {
        **write_windows(config),
        "use_sliding_window": first < config.layers,
        # For older programs, which do not know `layer_types`.
        "max_window_layers": first,
    }


QWEN_WINDOWS = Trait(read_qwen, write_qwen)


def window_pattern(period: int) -> Trait:
    """Windows in all layers but the last of each period, or as `layer_types` says.

    The key `sliding_window_pattern` gives another period.
    """

    def read(values: Values) -> dict[str, Any]:
        return {"windows": read_windows(types_of(values), values["sliding_window"], values)}

    def write(config: Config) -> dict[str, Any]:
        return {**write_some_window(config), "sliding_window_pattern": period}

    return Trait(read, write)


def types_of(values: Values) -> Sequence[str]:
    """The type of each layer, from `layer_types` or else by a period."""
    types = values["layer_types"]
    return types_by_period(values["sliding_window_pattern"], values) if types is None else types


def types_by_period(period: Any, values: Values) -> list[str]:
    """The type of each layer if the last layer of each period has no window."""
    if not isinstance(period, int) or not period > 0:
        raise ValueError(
            "`sliding_window_pattern` in config.json must be a positive integer if there is no "
            f"`layer_types`; got {period!r}."
        )
    return [
        SLIDING if layer % period else FULL for layer in range(1, values["num_hidden_layers"] + 1)
    ]


def read_gemma2(values: Values) -> dict[str, Any]:
    """Gemma 2: windows in every other layer, from the first one on."""
    types = values["layer_types"] or types_by_period(2, values)
    return {"windows": read_windows(types, values["sliding_window"], values)}


GEMMA2_WINDOWS = Trait(read_gemma2, write_some_window)


def query_scalar(values: Values) -> dict[str, Any]:
    """Gemma 2 and 3: the scores are divided by the root of a number."""
    return {"attention_scale": values["query_pre_attn_scalar"] ** -0.5}


def write_query_scalar(config: Config) -> dict[str, Any]:
    """The inverse of `query_scalar`."""
    scalar = config.attention_scale**-2
    # A whole number is written as an integer, which `transformers` declares.
    return {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar
    }


QUERY_SCALAR = Trait(query_scalar, write_query_scalar)

GEMMA_EMBEDDING = Trait(
    lambda values: {"embedding_scale": values["hidden_size"] ** 0.5}, lambda config: {}
)
"""All Gemmas: embedded tokens are multiplied by the root of the width."""


def read_gemma(values: Values) -> dict[str, Any]:
    """Gemma 1: the first files say `gelu` and mean its approximation."""
    activation = values["hidden_act"]
    return {"activation": "gelu_pytorch_tanh" if activation == "gelu" else activation}


GEMMA_ACTIVATION = Trait(read_gemma, lambda config: {})


def read_gpt2(values: Values) -> dict[str, Any]:
    """GPT-2: the scores may be unscaled."""
    return {} if values["scale_attn_weights"] else {"attention_scale": 1.0}


GPT2_SCALE = Trait(read_gpt2, lambda config: {"scale_attn_weights": config.attention_scale != 1})


def inverse(number: float) -> float:
    """The number whose inverse is exactly `number`, if there is one."""
    guess = 1 / number
    near = (guess, math.nextafter(guess, 0), math.nextafter(guess, math.inf))
    return next((candidate for candidate in near if 1 / candidate == number), guess)


LOGITS_SCALING = Trait(
    lambda values: {"logit_scale": 1 / values["logits_scaling"]},
    lambda config: {"logits_scaling": inverse(config.logit_scale)},
)
"""Granite: the logits are divided by a number."""
