"""Valid values of the keys of a `config.json`: the kind of each key, and its check.

`config_json.py` interprets the keys, and `Config` checks that their values fit each other.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of value: its name in an error, and a predicate for values of this kind."""

    wanted: str
    holds: Callable[[Any], bool]


def optional(kind: Kind) -> Kind:
    """The same kind, or null."""
    return Kind(f"{kind.wanted}, or null", lambda x: x is None or kind.holds(x))


def _is_integer(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _are_texts(x: Any) -> bool:
    return isinstance(x, list | tuple) and all(isinstance(item, str) for item in x)


def _are_integers(x: Any) -> bool:
    return isinstance(x, list | tuple) and all(map(_is_integer, x))


def _are_switches(x: Any) -> bool:
    return isinstance(x, list | tuple) and all(item in (0, 1) for item in x)


def _are_counts(x: Any) -> bool:
    return isinstance(x, list | tuple) and all(_is_integer(item) and item >= 0 for item in x)


def _are_positive(x: Any) -> bool:
    return isinstance(x, list | tuple) and all(_is_number(item) and item > 0 for item in x)


SIZE = Kind("a positive integer", lambda x: _is_integer(x) and x > 0)
COUNT = Kind("an integer of at least 0", lambda x: _is_integer(x) and x >= 0)
NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a positive number", lambda x: _is_number(x) and x > 0)
NOT_NEGATIVE = Kind("a number of at least 0", lambda x: _is_number(x) and x >= 0)
RATE = Kind("a number from 0 to below 1", lambda x: _is_number(x) and 0 <= x < 1)
FRACTION = Kind("a number above 0 and at most 1", lambda x: _is_number(x) and 0 < x <= 1)
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("a text", lambda x: isinstance(x, str))
TEXTS = Kind("a list of texts", _are_texts)
INTEGERS = Kind("a list of integers", _are_integers)
SWITCHES = Kind("a list of 0 and 1", _are_switches)
COUNTS = Kind("a list of integers of at least 0", _are_counts)
POSITIVES = Kind("a list of positive numbers", _are_positive)
COUNT_OR_TEXT = Kind(
    "an integer of at least 0, or a text",
    lambda x: isinstance(x, str) or (_is_integer(x) and x >= 0),
)
OBJECT = Kind("an object of keys and values", lambda x: isinstance(x, Mapping))


def _each(kind: Kind, *keys: str) -> dict[str, Kind]:
    return dict.fromkeys(keys, kind)


# One table for all families: a key has the same meaning in each of them.
KINDS = {
    **_each(SIZE, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    **_each(SIZE, "intermediate_size", "max_position_embeddings"),
    **_each(SIZE, "n_embd", "n_layer", "n_head", "n_positions"),
    **_each(optional(SIZE), "num_key_value_heads", "head_dim", "n_inner", "sliding_window"),
    **_each(optional(SIZE), "original_max_position_embeddings"),
    **_each(COUNT, "max_window_layers"),
    **_each(SIZE, "rotary_dim", "no_rope_layer_interval"),
    **_each(COUNT, "num_experts", "num_local_experts", "num_experts_per_tok"),
    **_each(SIZE, "moe_intermediate_size", "decoder_sparse_step"),
    **_each(optional(COUNTS), "mlp_only_layers"),
    **_each(POSITIVE, "swiglu_limit", "swiglu_alpha"),
    **_each(FLAG, "norm_topk_prob"),
    **_each(optional(COUNT_OR_TEXT), "sliding_window_pattern"),
    **_each(optional(SWITCHES), "no_rope_layers"),
    **_each(POSITIVE, "query_pre_attn_scalar", "logit_scale", "logits_scaling"),
    **_each(POSITIVE, "embedding_multiplier", "residual_multiplier", "attention_multiplier"),
    **_each(POSITIVE, "rotary_emb_base", "rope_local_base_freq"),
    **_each(optional(POSITIVE), "clip_qkv"),
    **_each(optional(POSITIVE), "attn_logit_softcapping", "final_logit_softcapping", "rope_theta"),
    **_each(optional(FRACTION), "partial_rotary_factor", "rotary_pct"),
    **_each(NOT_NEGATIVE, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    **_each(NOT_NEGATIVE, "norm_eps", "norm_epsilon"),
    **_each(RATE, "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout"),
    **_each(RATE, "residual_dropout", "embedding_dropout"),
    **_each(optional(RATE), "attention_dropout"),
    **_each(FLAG, "tie_word_embeddings", "attention_bias", "mlp_bias", "qk_layernorm"),
    **_each(FLAG, "use_qkv_bias", "use_parallel_residual", "attention_out_bias"),
    **_each(optional(FLAG), "use_bias", "use_qk_norm"),
    **_each(FLAG, "use_sliding_window", "scale_attn_weights", "add_cross_attention"),
    **_each(FLAG, "scale_attn_by_inverse_layer_idx"),
    **_each(optional(FLAG), "use_bidirectional_attention"),
    **_each(TEXT, "hidden_act", "hidden_activation", "activation_function"),
    **_each(SIZE, "conv_L_cache", "block_multiple_of", "full_attention_interval"),
    **_each(SIZE, "linear_conv_kernel_dim", "linear_num_key_heads", "linear_num_value_heads"),
    **_each(SIZE, "linear_key_head_dim", "linear_value_head_dim"),
    **_each(optional(SIZE), "block_ff_dim"),
    **_each(optional(POSITIVE), "block_ffn_dim_multiplier"),
    **_each(FLAG, "conv_bias", "block_auto_adjust_ff_dim"),
    **_each(optional(FLAG), "tie_embedding"),
    **_each(optional(INTEGERS), "full_attn_idxs"),
    **_each(optional(TEXTS), "layer_types"),
    **_each(optional(OBJECT), "rope_scaling", "rope_parameters"),
}


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Raises if values are not of their kinds; the error names each. Keys without a kind pass.

    **Arguments:**

    - `where`: the name of the file, or of the key, that holds the values.
    """
    check_all(
        f"`{key}` in {where} must be {kinds[key].wanted}; got {shown(value)}"
        for key, value in values.items()
        if key in kinds and not kinds[key].holds(value)
    )


def check_all(problems: Iterable[str]) -> None:
    """Raises one error with all problems, if there are any."""
    messages = list(problems)
    if messages:
        raise ValueError("; ".join(messages) + ".")


def shown(value: Any, limit: int = 60) -> str:
    """A value as an error shows it, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
