"""Families with a mixture of experts in each layer, as tables.

Dense families are in the other modules of tables that `families.py` joins.
"""

from . import (
    family_experts as experts,
    family_keys as traits,
    tensor_names as names,
)
from .family import DEFAULTS, KEYS, Family

_EXPERT_KEYS = {**KEYS, "num_experts_per_tok": "experts_per_token"}

EXPERTS = {
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        names=names.MIXTRAL,
        defaults={
            **DEFAULTS,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 4096 * 32,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        keys={**_EXPERT_KEYS, "num_local_experts": "experts"},
        traits=(experts.EXPERTS_IN_ALL_LAYERS, traits.ONE_WINDOW, traits.ROTARY),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        names=names.QWEN3_MOE,
        defaults={
            **DEFAULTS,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": None,
        },
        keys={
            **_EXPERT_KEYS,
            "attention_bias": "query_bias",
            "num_experts": "experts",
            "moe_intermediate_size": "expert_width",
            "norm_topk_prob": "normalised_routes",
        },
        fixed={"query_key_norm": True},
        traits=(
            traits.OUTPUT_BIAS,
            experts.SWITCHED_WINDOW,
            experts.SPARSE_LAYERS,
            traits.ROTARY,
        ),
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        classifier=None,
        names=names.QWEN3_MOE,
        defaults={
            **DEFAULTS,
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "clip_qkv": None,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        keys={
            **_EXPERT_KEYS,
            "attention_bias": "query_bias",
            "clip_qkv": "projection_clip",
            "num_experts": "experts",
            "norm_topk_prob": "normalised_routes",
        },
        fixed={"query_key_norm": True, "query_key_norm_axes": "all"},
        traits=(experts.EXPERTS_IN_ALL_LAYERS, traits.OUTPUT_BIAS, traits.ROTARY),
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        names=names.GPT_OSS,
        defaults={
            **DEFAULTS,
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 36,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": None,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        keys={
            **_EXPERT_KEYS,
            "attention_bias": "query_bias",
            "num_local_experts": "experts",
            "swiglu_alpha": "swiglu_alpha",
            "swiglu_limit": "swiglu_limit",
        },
        fixed={"feed_forward_bias": True, "router_bias": True, "attention_sinks": True},
        traits=(
            experts.EXPERTS_IN_ALL_LAYERS,
            traits.OUTPUT_BIAS,
            traits.GEMMA2_WINDOWS,
            experts.GPT_OSS_ROTARY,
        ),
        # The length before YaRN, which `rope_scaling` repeats.
        neutral={"initial_context_length": ...},
    ),
}
