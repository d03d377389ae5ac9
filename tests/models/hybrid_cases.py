"""Small checkpoints of the families with layers of two kinds, in the form of `family_cases.py`.

Their layers repeat a block, have a rest behind the blocks, or have no order at all.
"""

_IRREGULAR = ["conv", "full_attention", "conv", "conv", "full_attention"]
# The types of the layers of LFM2-1.2B, whose blocks are of three layers and then of two.
_PUBLISHED = [*["conv", "conv", "full_attention"] * 3, *["conv", "full_attention"] * 3, "conv"]
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "head_dim": 16,
}
# By name, the `model_type` and the keys that differ from `SMALL`.
HYBRIDS = {
    "lfm2": (
        "lfm2",
        {
            "num_hidden_layers": 5,
            "layer_types": _IRREGULAR,
            "conv_bias": True,
            "block_auto_adjust_ff_dim": True,
            "block_multiple_of": 10,
            "block_ffn_dim_multiplier": 1.3,
        },
    ),
    "lfm2-published": (
        "lfm2",
        {
            "num_hidden_layers": 16,
            "layer_types": _PUBLISHED,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "block_ff_dim": 30,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "lfm2-indices": (
        "lfm2",
        {
            "full_attn_idxs": [0, 2],
            "conv_L_cache": 5,
            "head_dim": 10,
            "tie_embedding": False,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
    ),
    "lfm2-convolutions": ("lfm2", {"layer_types": ["conv"] * 3, "conv_L_cache": 1}),
    "lfm2-attention": ("lfm2", {}),
    "qwen3-5": ("qwen3_5_text", {**DELTA, "num_hidden_layers": 8}),
    "qwen3-5-rest": (
        "qwen3_5_text",
        {
            **DELTA,
            "num_hidden_layers": 6,
            "full_attention_interval": 4,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 3,
            "attention_bias": True,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
        },
    ),
    "qwen3-5-delta": (
        "qwen3_5_text",
        {**DELTA, "layer_types": ["linear_attention"] * 3, "linear_key_head_dim": 12},
    ),
}
