"""Options of the families' configurations, one or a few at a time; `sweep_options.py` runs them.

The table is legal input for `transformers`, in the forms of old and new files. Behind its cases are
random ones: other sizes, and several options at once. Cases whose logits are golden values are in
`family_cases.py`.
"""

import random
from collections.abc import Iterator
from typing import Any

from .family_cases import GPTJ, LONG, MIXED, SMALL, YARN
from .hybrid_cases import DELTA
from .make_families import read_defaults

MOE = {"num_experts": 5, "num_experts_per_tok": 2}
# The keys of each family that differ from `SMALL`.
_PLAIN = "llama mistral qwen2 arcee smollm3 granite phi3 stablelm starcoder2 olmo olmo2 olmo3"
_PLAIN += " cohere exaone4 apertus phi lfm2 nanochat"
_HEADS = "ministral ministral3 qwen3 seed_oss helium gemma gemma2 gemma3_text glm glm4 nemotron"
_HEADS += " cohere2 ernie4_5 hunyuan_v1_dense"
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN.split()},
    **{name: {"head_dim": 8} for name in _HEADS.split()},
    "gpt2": GPTJ,
    "gptj": {**GPTJ, "rotary_dim": 4},
    "codegen": {**GPTJ, "rotary_dim": 4},
    "gpt_neox": {"rotary_pct": 0.5},
    "qwen3_5_text": {**DELTA, "num_hidden_layers": 4},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {**MOE, "moe_intermediate_size": 24, "head_dim": 8},
    "olmoe": MOE,
    "gpt_oss": {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 6,
    },
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOWED = {"sliding_window": 6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROTARY = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn-all": {
        **YARN,
        "attention_factor": 1.3,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    "llama3": LLAMA3,
    "longrope": {**LONG, "original_max_position_embeddings": 24},
    "longrope-factor": {**LONG, "original_max_position_embeddings": 24, "factor": 6.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
}
# What is tried in every family. Some of it a family ignores, as `transformers` does.
EVERYWHERE: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-layer": {"num_hidden_layers": 1},
    "five-layers": {"num_hidden_layers": 5},
    "one-key-head": {"num_key_value_heads": 1},
    "all-key-heads": {"num_key_value_heads": 6},
    "no-key-heads": {"num_key_value_heads": None},
    "wide-heads": {"head_dim": 14},
    "no-head-dim": {"head_dim": None},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "odd-vocabulary": {"vocab_size": 83},
    "attention-bias": {"attention_bias": True},
    "no-attention-bias": {"attention_bias": False},
    "mlp-bias": {"mlp_bias": True},
    "short": {"max_position_embeddings": 16},
    "theta": {"rope_theta": 777.0},
    "theta-inside": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "partial-outside": {"partial_rotary_factor": 0.5},
    "window": {"sliding_window": 6},
    "no-window": {"sliding_window": None},
    "mixed": {"sliding_window": 6, "layer_types": MIXED},
    "mixed-switched": {"sliding_window": 6, "layer_types": MIXED, "use_sliding_window": True},
    "all-sliding": {"sliding_window": 6, "layer_types": ["sliding_attention"] * 3},
    "all-full": {"sliding_window": 6, "layer_types": ["full_attention"] * 3},
    "switched": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "switched-off": {"sliding_window": 6, "use_sliding_window": False},
    "dropout": {"attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
}
ACTIVATIONS = ("gelu", "relu", "gelu_pytorch_tanh", "relu2", "quick_gelu", "swish", "gelu_new")
ACTIVATIONS += ("gelu_fast", "gelu_python", "gelu_python_tanh", "gelu_accurate", "gelu_10", "mish")
ACTIVATIONS += ("hardswish", "laplace", "leaky_relu", "linear", "relu6", "sigmoid", "tanh")
ACTIVATIONS += ("sqrtsoftplus", "silu")
SOME = ("gelu", "relu", "silu")
# What single families have besides.
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        **{f"act-{name}": {"hidden_act": name} for name in ACTIVATIONS},
        "old": {"pretraining_tp": 1, "rope_scaling": None, "torch_dtype": "float16"},
        "su": {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "qwen-alias": {"num_key_value_heads": 3, "rms_norm_eps": 1e-2},
    },
    "smollm3": {
        "interval": {"no_rope_layer_interval": 2},
        "interval-long": {"no_rope_layer_interval": 2, "num_hidden_layers": 5},
        "listed": {"no_rope_layers": [0, 1, 0]},
        "windowed": {"use_sliding_window": True, **WINDOWED, "no_rope_layers": [0, 1, 0]},
    },
    "seed_oss": {"out-bias": {"attention_out_bias": True}, "no-bias": {"attention_bias": False}},
    "granite": {
        "multipliers": {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 7.0,
        }
    },
    "hunyuan_v1_dense": {
        "alpha": {"rope_scaling": {"type": "dynamic", "alpha": 50.0, "factor": 1.0}},
        "alpha-wide": {
            "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "rope_theta": 500.0},
            "head_dim": 14,
        },
    },
    "nanochat": {"uncapped": {"final_logit_softcapping": None}},
    "ernie4_5": {"bias": {"use_bias": True}},
    "phi3": {
        "long": {"rope_scaling": LONG, "original_max_position_embeddings": 24},
        "long-old": {
            "rope_scaling": {"type": "su", **{k: v for k, v in LONG.items() if k != "rope_type"}},
            "original_max_position_embeddings": 24,
        },
        "long-partial": {
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.2],
                "long_factor": [2.0, 2.5],
            },
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 24,
        },
    },
    "gemma2": {
        "caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "uncapped": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "scalar": {"query_pre_attn_scalar": 11},
        "old": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    },
    "gemma3_text": {
        "pattern": {"sliding_window_pattern": 2, **WINDOWED},
        "pattern-long": {"sliding_window_pattern": 2, "num_hidden_layers": 5, **WINDOWED},
        "six": {"num_hidden_layers": 7, **WINDOWED},
        "old": {
            "rope_theta": 5000.0,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            **WINDOWED,
            "sliding_window_pattern": 2,
        },
        "caps": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 1.0},
        "nested": {
            **WINDOWED,
            "layer_types": MIXED,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
                "sliding_attention": {**YARN, "rope_theta": 300.0},
            },
        },
        "scalar": {"query_pre_attn_scalar": 11},
    },
    "olmo3": {
        "five": {"num_hidden_layers": 5, **WINDOWED},
        "yarn": {"rope_scaling": YARN, "rope_theta": 700.0, **WINDOWED, "num_hidden_layers": 4},
        "nested": {
            **WINDOWED,
            "layer_types": MIXED,
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    },
    "exaone4": {
        "pattern": {"sliding_window_pattern": 2, **WINDOWED, "num_hidden_layers": 5},
        "letters": {"sliding_window_pattern": "LLG", **WINDOWED},
        "none": {"sliding_window": None, "sliding_window_pattern": None},
        "five": {"num_hidden_layers": 5, **WINDOWED},
    },
    "cohere": {"norms": {"use_qk_norm": True, "logit_scale": 0.3}},
    "cohere2": {
        "pattern": {"sliding_window_pattern": 2, **WINDOWED, "num_hidden_layers": 5},
        "five": {"num_hidden_layers": 5, **WINDOWED},
        "scale": {"logit_scale": 0.25},
    },
    "apertus": {f"act-{name}": {"hidden_act": name} for name in SOME},
    "phi": {
        "norms": {"qk_layernorm": True},
        "partial": {"partial_rotary_factor": 0.25},
        "whole": {"partial_rotary_factor": 1.0},
    },
    "stablelm": {
        "qkv-bias": {"use_qkv_bias": True},
        "norms": {"qk_layernorm": True},
        "parallel": {"use_parallel_residual": True},
        "parallel-norms": {"use_parallel_residual": True, "qk_layernorm": True},
        "whole": {"partial_rotary_factor": 1.0},
    },
    "starcoder2": {
        "no-bias": {"use_bias": False},
        "rms": {"norm_type": "layer_norm", "mlp_type": "default"},
    },
    "olmo": {"clip": {"clip_qkv": 0.4}},
    "gpt2": {
        "unscaled": {"scale_attn_weights": False},
        "by-layer": {"scale_attn_by_inverse_layer_idx": True},
        "upcast": {"reorder_and_upcast_attn": True},
        "inner": {"n_inner": None},
        **{f"act-{name}": {"activation_function": name} for name in ("relu", "gelu", "silu")},
    },
    "gptj": {
        "whole": {"rotary_dim": 12},
        "none": {"rotary_dim": None},
        "inner": {"n_inner": None},
        "act": {"activation_function": "relu"},
    },
    "codegen": {
        "whole": {"rotary_dim": 12},
        "none": {"rotary_dim": None},
        "inner": {"n_inner": None},
        "act": {"activation_function": "relu"},
    },
    "gpt_neox": {
        "serial": {"use_parallel_residual": False},
        "whole": {"rotary_pct": 1.0},
        "base": {"rotary_emb_base": 300},
        "older": {"hidden_dropout": 0.1, "rope_scaling": None, "classifier_dropout": 0.1},
        "act": {"hidden_act": "gelu_new"},
        "scaled": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    },
    "lfm2": {
        "conv": {"layer_types": ["conv", "full_attention", "conv"]},
        "indices": {"full_attn_idxs": [1]},
        "bias": {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True},
        "kernel": {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 4},
        "unadjusted": {"block_auto_adjust_ff_dim": False},
        "multiple": {"block_multiple_of": 10, "block_ffn_dim_multiplier": 1.3},
        "no-multiplier": {"block_ffn_dim_multiplier": None},
        "old": {"block_ff_dim": 60, "tie_embedding": True, "block_norm_eps": 1e-5, "theta": 9.0},
        "eps": {"norm_eps": 1e-2},
    },
    "qwen3_5_text": {
        "interval": {"full_attention_interval": 2, "num_hidden_layers": 5},
        "one": {"num_hidden_layers": 1},
        "attention": {"layer_types": ["full_attention"] * 4},
        "alternating": {"layer_types": ["full_attention", "linear_attention"] * 2},
        "kernel": {"linear_conv_kernel_dim": 2},
        "equal-heads": {"linear_num_key_heads": 3, "linear_num_value_heads": 3},
        "act": {"hidden_act": "relu"},
        "partial": {"partial_rotary_factor": 0.5},
        "whole": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}},
        "images": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 900.0,
                "mrope_section": [1, 1, 0],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            }
        },
    },
    "mixtral": {
        "one": {"num_experts_per_tok": 1},
        "all": {"num_experts_per_tok": 5},
        "jitter": {"router_jitter_noise": 0.1, "router_aux_loss_coef": 0.02},
        "act": {"hidden_act": "gelu"},
        "logits": {"output_router_logits": True},
    },
    "qwen3_moe": {
        "normalised": {"norm_topk_prob": True},
        "dense-first": {"mlp_only_layers": [0]},
        "dense-middle": {"mlp_only_layers": [1]},
        "every-other": {"decoder_sparse_step": 2},
        "every-third": {"decoder_sparse_step": 3, "num_hidden_layers": 7},
        "both": {"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 5},
        "no-experts": {"num_experts": 0},
        "mixed-long": {"mlp_only_layers": [0, 4], "decoder_sparse_step": 1, "num_hidden_layers": 5},
        "all-dense": {"mlp_only_layers": [0, 1, 2]},
        "windowed": {"use_sliding_window": True, **WINDOWED, "max_window_layers": 1},
        "windowed-dense": {"use_sliding_window": True, **WINDOWED, "mlp_only_layers": [1]},
        "all": {"num_experts_per_tok": 5},
        "act": {"hidden_act": "gelu"},
    },
    "olmoe": {
        "normalised": {"norm_topk_prob": True},
        "clip": {"clip_qkv": 0.4},
        "one": {"num_experts_per_tok": 1},
    },
    "gpt_oss": {
        "limit": {"swiglu_limit": 0.5, "swiglu_alpha": 1.2},
        "act": {"hidden_act": "gelu"},
        "old": {"rope_scaling": {**YARN, "truncate": False}, "rope_theta": 900.0},
        "initial": {"initial_context_length": 4096, "experts_per_token": 2},
    },
}


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case: its name, and all keys of its `config.json`."""
    defaults = read_defaults()
    for family, keys in FAMILIES.items():
        base = {} if family in ("gpt2", "gptj", "codegen") else SMALL
        base = {**base, **keys, **TOKENS, "model_type": family}
        older = {
            f"{name}-older": {
                "rope_theta": 900.0,
                "rope_scaling": {
                    "type" if key == "rope_type" else key: value for key, value in settings.items()
                },
            }
            for name, settings in ROTARY.items()
        }
        newer = {
            f"{name}-newer": {"rope_parameters": {**settings, "rope_theta": 900.0}}
            for name, settings in ROTARY.items()
        }
        options = {**EVERYWHERE, **older, **newer, **OWN.get(family, {})}
        if family in ("gpt2", "gptj", "codegen"):
            options = {"plain": {}, **options_of_gpt(options), **OWN[family]}
        for name, settings in options.items():
            yield f"{family}/{name}", {**base, **settings}
        known = {*defaults[family]["config"], "rope_theta", "rope_scaling"}
        known |= {key for settings in OWN.get(family, {}).values() for key in settings}
        read = {name: keys for name, keys in options.items() if keys.keys() <= known}
        for i in range(RANDOM):
            yield f"{family}/random-{i}", random_case(random.Random(f"{family} {i}"), base, read)


# The number of random cases of each family.
RANDOM = 20
# Keys with an entry for each layer, so that the number of layers stays.
BY_LAYER = ("layer_types", "no_rope_layers", "mlp_only_layers", "full_attn_idxs")


def random_case(
    rng: random.Random, base: dict[str, Any], options: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Random sizes of the keys that `base` has, and up to four of the options."""
    heads, width = rng.choice([1, 2, 3, 4, 6, 8]), 2 * rng.randint(2, 10)
    keys = rng.choice([count for count in range(1, heads + 1) if heads % count == 0])
    experts = rng.randint(2, 9)
    sizes = {
        "vocab_size": rng.randint(80, 120),
        "hidden_size": heads * width,
        "num_hidden_layers": rng.randint(1, 6),
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": rng.randint(20, 90),
        "max_position_embeddings": rng.choice([16, 32, 64, 200]),
        "head_dim": rng.choice([width, 2 * rng.randint(3, 12)]),
        "n_embd": heads * width,
        "n_layer": rng.randint(1, 5),
        "n_head": heads,
        "n_inner": rng.randint(20, 90),
        "n_positions": rng.randint(40, 90),
        "rotary_dim": 2 * rng.randint(1, width // 2),
        "moe_intermediate_size": rng.randint(10, 40),
        "num_experts": experts,
        "num_local_experts": experts,
        "num_experts_per_tok": rng.randint(1, experts),
        "linear_key_head_dim": rng.randint(2, 12),
        "linear_value_head_dim": rng.randint(2, 12),
        "sliding_window": rng.randint(1, 20),
    }
    chosen = rng.sample(sorted(options), rng.randint(0, 4))
    settings = {key: value for name in chosen for key, value in options[name].items()}
    kept = ("num_hidden_layers", "n_layer") if settings.keys() & set(BY_LAYER) else ()
    sizes = {key: size for key, size in sizes.items() if key in base and key not in kept}
    return {**base, **sizes, **settings}


def options_of_gpt(options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options under GPT-2's names of keys."""
    names = {"num_hidden_layers": "n_layer", "vocab_size": "vocab_size"}
    names |= {"tie_word_embeddings": "tie_word_embeddings"}
    return {
        option: {names[key]: value for key, value in settings.items()}
        for option, settings in options.items()
        if settings and settings.keys() <= names.keys()
    }
