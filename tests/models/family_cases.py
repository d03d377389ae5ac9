"""Small checkpoints of all families with many of their options: configurations and weights.

`make_families.py` computes their logits by `transformers`; `test_more_families.py` compares ours.
"""

import zlib

import numpy as np

from .hybrid_cases import HYBRIDS

# The families whose other cases are in `compare_transformers.py`.
OLDER = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "phi", "gemma2")
SMALL = {
    "vocab_size": 80,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": 128,
}
GPTJ = {
    "vocab_size": 80,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 72,
    "n_positions": 64,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 3.5],
}
# The keys of Ministral 3's rotary embeddings.
GROWN = {**YARN, "llama_4_scaling_beta": 0.2, "mscale": 1.0, "mscale_all_dim": 0.5}
# By name, the `model_type` and the keys that differ from `SMALL`.
DENSE = {
    "llama-dynamic": (
        "llama",
        {"max_position_embeddings": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "llama-dynamic-short": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}),
    "llama-longrope": (
        "llama",
        {"rope_scaling": {**LONG, "original_max_position_embeddings": 24}},
    ),
    "llama-proportional": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "proportional",
                "rope_theta": 5000.0,
                "partial_rotary_factor": 0.5,
                "factor": 1.5,
            }
        },
    ),
    "llama-quick-gelu": ("llama", {"hidden_act": "quick_gelu", "attention_bias": True}),
    "qwen3-windows": (
        "qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "ministral": ("ministral", {"sliding_window": 7, "layer_types": MIXED, "head_dim": 10}),
    "ministral-all": ("ministral", {"sliding_window": 7, "head_dim": 8}),
    "ministral3": ("ministral3", {"head_dim": 12, "rope_parameters": GROWN}),
    "ministral3-window": (
        "ministral3",
        {"head_dim": 8, "sliding_window": 9, "rope_parameters": {**GROWN, "factor": 2.0}},
    ),
    "gemma": ("gemma", {"head_dim": 12, "num_key_value_heads": 1}),
    "gemma-gelu": ("gemma", {"head_dim": 8, "hidden_act": "gelu", "attention_bias": True}),
    "gemma3": ("gemma3_text", {"head_dim": 12, "sliding_window": 6, "layer_types": MIXED}),
    "gemma3-scaled": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 50000.0,
            "rope_local_base_freq": 500.0,
            "query_pre_attn_scalar": 11,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 1.0,
            "attention_bias": True,
        },
    ),
    "arcee": ("arcee", {"mlp_bias": True, "attention_bias": True}),
    "smollm3": (
        "smollm3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 6},
    ),
    "smollm3-listed": (
        "smollm3",
        {"no_rope_layers": [0, 1, 1], "tie_word_embeddings": False, "mlp_bias": True},
    ),
    "seed-oss": ("seed_oss", {"head_dim": 12, "attention_out_bias": True, "mlp_bias": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 6}),
    "starcoder2-plain": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm-parallel": (
        "stablelm",
        {"use_parallel_residual": True, "rope_parameters": {"partial_rotary_factor": 1.0}},
    ),
    "helium": ("helium", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 7.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "nemotron": ("nemotron", {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 12, "attention_bias": True}),
    "hunyuan-alpha": (
        "hunyuan_v1_dense",
        {"head_dim": 12, "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}},
    ),
    "nanochat": ("nanochat", {"attention_bias": True}),
    "nanochat-uncapped": ("nanochat", {"final_logit_softcapping": None, "head_dim": 12}),
    "ernie": ("ernie4_5", {"head_dim": 12, "use_bias": True, "tie_word_embeddings": False}),
    "phi3": ("phi3", {"sliding_window": 6, "num_key_value_heads": 3}),
    "phi3-partial": ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "phi3-long": (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 24},
    ),
    "phi3-short": (
        "phi3",
        {
            "original_max_position_embeddings": 100,
            "rope_scaling": {
                **LONG,
                "rope_type": "su",
                "attention_factor": 1.3,
                "original_max_position_embeddings": 100,
            },
        },
    ),
    "glm": ("glm", {"head_dim": 12, "partial_rotary_factor": 1.0}),
    "glm-plain": ("glm", {"head_dim": 12, "attention_bias": False}),
    "glm4": ("glm4", {"head_dim": 12, "attention_bias": False}),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500.0}),
    "gpt-neox-serial": (
        "gpt_neox",
        {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
    ),
    "gptj": ("gptj", {"rotary_dim": 10}),
    "codegen": ("codegen", {"n_head": 8, "rotary_dim": 4}),
    "codegen-one-block-a-head": ("codegen", {"rotary_dim": 12}),
    "olmo": ("olmo", {"clip_qkv": 0.5, "attention_bias": True}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo3": (
        "olmo3",
        {"sliding_window": 6, "layer_types": MIXED, "rope_scaling": YARN, "rope_theta": 700.0},
    ),
    "cohere": (
        "cohere",
        {"use_qk_norm": True, "logit_scale": 0.3, "attention_bias": True},
    ),
    "cohere-untied": ("cohere", {"tie_word_embeddings": False, "num_key_value_heads": 6}),
    "cohere2": ("cohere2", {"sliding_window": 6, "sliding_window_pattern": 2}),
    "cohere2-full": ("cohere2", {"layer_types": ["full_attention"] * 3, "attention_bias": True}),
    "exaone4": ("exaone4", {"sliding_window": 6, "sliding_window_pattern": 3}),
    "exaone4-full": (
        "exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 3, "head_dim": 10},
    ),
    "apertus": ("apertus", {"attention_bias": True}),
    "apertus-silu": ("apertus", {"hidden_act": "silu", "rope_scaling": YARN}),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7, "head_dim": 12},
    ),
    "mixtral-one": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 12,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": False,
        },
    ),
    "qwen3-moe-windows": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
        },
    ),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "clip_qkv": 0.5}),
    "olmoe-normalised": (
        "olmoe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "attention_bias": True,
            "hidden_act": "gelu",
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "head_dim": 12,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "swiglu_limit": 0.5,
            "swiglu_alpha": 1.2,
        },
    ),
    "gpt-oss-plain": (
        "gpt_oss",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "layer_types": MIXED[::-1][1:] + MIXED[:1],
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        },
    ),
}
# Options that were wrong or refused once; `option_cases.py` has many more.
OPTIONS = {
    "qwen3-moe-mixed": (
        "qwen3_moe",
        {
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "head_dim": 12,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
        },
    ),
    "qwen3-moe-dense": ("qwen3_moe", {"num_experts": 0, "num_experts_per_tok": 0}),
    "stablelm-norms": ("stablelm", {"qk_layernorm": True, "num_key_value_heads": 3}),
    # Parts of a head of 7 and of 3 places are rotated, rounded up.
    "glm-odd": ("glm", {"head_dim": 14}),
    "gpt-neox-odd": ("gpt_neox", {"num_attention_heads": 4, "rotary_pct": 0.25}),
    "gpt-neox-odd-dynamic": (
        "gpt_neox",
        {
            "num_attention_heads": 4,
            "rotary_pct": 0.5,
            "hidden_size": 40,
            "max_position_embeddings": 16,
            "rope_scaling": {"rope_type": "dynamic", "factor": 3.0},
        },
    ),
    "gpt2-by-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "phi-tied": ("phi", {"tie_word_embeddings": True, "partial_rotary_factor": 0.25}),
    "gptj-tied": (
        "gptj",
        {"tie_word_embeddings": True, "rotary_dim": 4, "activation_function": "mish"},
    ),
}
# By the name of the file with their golden logits.
GROUPS = {"families": DENSE, "hybrids": HYBRIDS, "options": OPTIONS}
CASES = {name: case for group in GROUPS.values() for name, case in group.items()}
IDS = np.random.default_rng(0).integers(0, 80, (2, 40))
# Where the logits are compared: more would only make the file larger.
POSITIONS, TOKENS = slice(None, None, 3), slice(None, None, 4)


def settings_of(name: str) -> tuple[str, dict]:
    """The `model_type` and the keys of a case."""
    family, settings = CASES[name]
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = GPTJ if family in ("gpt2", "gptj", "codegen") else SMALL
    return family, {**sizes, **tokens, **settings}


def weights_of(shapes: dict[str, list[int]], constants: dict[str, float]) -> dict[str, np.ndarray]:
    """Random weights in float32 for tensors of these names; every term of the network shows."""
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        is_norm = "norm" in name or ".ln_" in name
        mean = 1.0 if is_norm and name.endswith("weight") else 0.0
        scale = 0.1 if is_norm or name.endswith("bias") else 0.15
        values = constants[name] if name in constants else rng.normal(mean, scale, shape)
        weights[name] = np.asarray(values, np.float32)
    return weights
