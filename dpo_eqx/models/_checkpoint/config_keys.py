"""The keys of a `config.json` that a family does not read: which may be ignored, which may not.

`families.py` lists the keys that a family does read, and `config_values.py` their valid values.
"""

import re
from collections.abc import Mapping, Set
from typing import Any

from .._decoder.config import Config
from .config_values import shown

# Keys about training, running, generation, and the names of tokens and labels. None changes the
# logits.
_HARMLESS = frozenset(
    [
        # Keys of every configuration of `transformers`.
        *("architectures", "dtype", "torch_dtype", "name_or_path", "use_cache", "return_dict"),
        *("use_return_dict", "torchscript", "gradient_checkpointing", "chunk_size_feed_forward"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "prefix"),
        *(
            "task_specific_params",
            "tokenizer_class",
            "is_decoder",
            "use_bfloat16",
            "tf_legacy_loss",
        ),
        *("attn_implementation", "experts_implementation", "pretraining_tp", "init_std"),
        *("fp16", "bf16", "fp32", "use_flash_attn", "use_liger_kernel", "transformers.js_config"),
        # Generation.
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature"),
        *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "bad_words_ids"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"),
        *("return_dict_in_generate", "remove_invalid_values", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens", "epsilon_cutoff", "eta_cutoff"),
        *("encoder_repetition_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind"),
        *("num_beam_groups", "diversity_penalty", "max_new_tokens", "cache_implementation"),
        # Lengths used by the tokenizer or in training.
        *("model_max_length", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx"),
        # Old GPT-2; `reorder_and_upcast_attn` only changes the precision of the scores.
        *("n_special", "predict_special_tokens", "reorder_and_upcast_attn"),
        # Losses and noise of routers in training.
        *("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise"),
        # Notes by programs that wrote the file.
        *("unsloth_fixed", "is_llama_config"),
    ]
)
_HARMLESS_NAMES = re.compile(
    r"^_|^(summary|output|initializer)_|dropout|pdrop|layerdrop|_tokens?_ids?$|_version$"
    r"|^(bos|eos|pad|unk|sep|cls|mask)_token$"
)

# Values that switch a key's feature off. For keys not listed here: null, false and empty values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # Not null, which `transformers` reads as false.
    "is_causal": (True,),
    "scale_attn_weights": (True,),
    **dict.fromkeys(
        ["logit_scale", "logits_scaling", "residual_multiplier", "embedding_multiplier"], (None, 1)
    ),
    **dict.fromkeys(["partial_rotary_factor", "rotary_pct", "rope_ratio"], (None, 1)),
    **dict.fromkeys(
        ["num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"], (None, 0)
    ),
}

# Keys of other families. They are redundant if they agree with this field of the configuration.
_SAME = {
    **dict.fromkeys(["hidden_act", "hidden_activation", "activation_function"], "activation"),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], "width"),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], "layers"),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], "heads"),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], "key_heads"),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim"], "feed_forward"),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], "max_length"),
    **dict.fromkeys(["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"], "norm_eps"),
    **dict.fromkeys(["head_dim", "kv_channels"], "head_width"),
    "experts_per_token": "experts_per_token",
    "attention_bias": "query_bias",
    "mlp_bias": "feed_forward_bias",
    "attention_multiplier": "attention_scale",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "softcap",
}


def check_unread(
    values: Mapping[str, Any], read: Set[str], neutral: Mapping[str, Any], config: Config
) -> None:
    """Raises if unread keys may change the logits; the error names them.

    **Arguments:**

    - `values`: the parsed `config.json`.
    - `read`: the keys that the family reads.
    - `neutral`: the values of other keys that say what the family is anyway.
    - `config`: the configuration read from `values`.
    """
    values = {key: value for key, value in values.items() if not _agrees(key, value, neutral)}
    _check_code(values)
    unread = {
        key: value
        for key, value in values.items()
        if key not in read and key != "auto_map" and not _is_idle(key, value, values, config)
    }
    if unread:
        listed = ", ".join(f"`{key}` ({shown(unread[key])})" for key in sorted(unread))
        raise ValueError(
            f"The family {config.family!r} does not read these keys of config.json, which may "
            f"change what the model computes: {listed}. If the model computes the same without "
            "them, remove them from config.json; otherwise the model is not supported."
        )


def _agrees(key: str, value: Any, neutral: Mapping[str, Any]) -> bool:
    """Whether a key has its neutral value; an ellipsis stands for any value."""
    return key in neutral and (neutral[key] is ... or _equal(value, neutral[key]))


def _is_idle(key: str, value: Any, values: Mapping[str, Any], config: Config) -> bool:
    """Whether an unread key leaves the logits as they are."""
    if key in _HARMLESS or _HARMLESS_NAMES.search(key):
        return True
    if key in _NEUTRAL:
        return any(value is neutral or _equal(value, neutral) for neutral in _NEUTRAL[key])
    if value is None or value is False or value in ("", [], {}):
        return True
    if key in _SAME:
        return _equal(value, getattr(config, _SAME[key]))
    if key in ("sliding_window", "max_window_layers"):
        # Without windows these are only the values for when windows are on.
        return not values.get("use_sliding_window", key == "sliding_window")
    return key == "layer_types" and all(kind == "full_attention" for kind in value)


def _equal(value: Any, other: Any) -> bool:
    # 1 == True in Python, but not in JSON.
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _check_code(values: Mapping[str, Any]) -> None:
    """Raises if the checkpoint contains Python code for its own model."""
    code = values.get("auto_map")
    models = [key for key in code if key.startswith("AutoModel")] if isinstance(code, dict) else []
    if models:
        raise ValueError(
            f"`auto_map` in config.json names code of the checkpoint's own for {', '.join(models)} "
            f"({shown(code)}), which is never run. If the model computes the same as the class of "
            f"`transformers` for {values.get('model_type')!r}, remove `auto_map` from config.json."
        )
