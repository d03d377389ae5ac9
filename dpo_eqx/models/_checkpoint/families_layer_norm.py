"""Families with layer norms, as tables: Phi, StableLM, StarCoder2, Nemotron, OLMo 1 and Cohere.

GPT-2 and its kin are in `families_gpt.py`.
"""

from . import family_keys as traits, family_layers as layers, tensor_names as names
from .family import DEFAULTS, KEYS, Family, without

# The norm's epsilon has another name, or there is none.
_DEFAULTS, _KEYS = without(DEFAULTS, "rms_norm_eps"), without(KEYS, "rms_norm_eps")
_COHERE = {
    **_DEFAULTS,
    "vocab_size": 256000,
    "hidden_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "intermediate_size": 22528,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_COHERE_KEYS = {
    **_KEYS,
    "attention_bias": "query_bias",
    "layer_norm_eps": "norm_eps",
    "logit_scale": "logit_scale",
}
_COHERE_FIXED = {"norm": "layer", "norm_bias": False, "parallel": True}

LAYER_NORM = {
    "phi": Family(
        architecture="PhiForCausalLM",
        names=names.PHI,
        defaults={
            **_DEFAULTS,
            "vocab_size": 51200,
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "intermediate_size": 8192,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "qk_layernorm": False,
            "partial_rotary_factor": 0.5,
        },
        keys={
            **_KEYS,
            "layer_norm_eps": "norm_eps",
            "resid_pdrop": "residual_dropout",
            "embd_pdrop": "embedding_dropout",
            "qk_layernorm": "query_key_norm",
        },
        fixed={
            "norm": "layer",
            "gated": False,
            "parallel": True,
            "query_bias": True,
            "output_bias": True,
            "feed_forward_bias": True,
            "unembedding_bias": True,
        },
        traits=(traits.half_rotary(0.5),),
    ),
    "stablelm": Family(
        architecture="StableLmForCausalLM",
        names=names.LLAMA,
        defaults={
            **without(_DEFAULTS, "head_dim"),
            "vocab_size": 50304,
            "hidden_size": 2560,
            "num_key_value_heads": 32,
            "intermediate_size": 6912,
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "partial_rotary_factor": 0.25,
        },
        keys={
            **without(_KEYS, "head_dim"),
            "layer_norm_eps": "norm_eps",
            "use_qkv_bias": "query_bias",
            "use_parallel_residual": "parallel",
        },
        fixed={"norm": "layer"},
        traits=(traits.refusing("qk_layernorm"), traits.PARTIAL_ROTARY),
    ),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        names=names.STARCODER2,
        defaults={
            **_DEFAULTS,
            "vocab_size": 49152,
            "hidden_size": 3072,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "intermediate_size": 12288,
            "max_position_embeddings": 4096,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "sliding_window": None,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "use_bias": True,
        },
        keys={
            **_KEYS,
            "norm_epsilon": "norm_eps",
            "residual_dropout": "residual_dropout",
            "embedding_dropout": "embedding_dropout",
            "use_bias": "query_bias",
        },
        fixed={"norm": "layer", "gated": False},
        traits=(
            traits.same_for("use_bias", "query_bias", "output_bias", "feed_forward_bias"),
            traits.ONE_WINDOW,
            traits.ROTARY,
        ),
        neutral={
            "norm_type": "layer_norm",
            "mlp_type": "default",
            "attention_softmax_in_fp32": True,
            "scale_attention_softmax_in_fp32": True,
        },
    ),
    "nemotron": Family(
        architecture="NemotronForCausalLM",
        names=names.LLAMA,
        defaults={
            **_DEFAULTS,
            "vocab_size": 256000,
            "hidden_size": 6144,
            "num_attention_heads": 48,
            "intermediate_size": 24576,
            "max_position_embeddings": 4096,
            "hidden_act": "relu2",
            "norm_eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
            "partial_rotary_factor": 0.5,
        },
        keys={
            **_KEYS,
            "norm_eps": "norm_eps",
            "attention_bias": "query_bias",
            "mlp_bias": "feed_forward_bias",
        },
        fixed={"norm": "layer", "norm_offset": 1.0, "gated": False},
        traits=(traits.OUTPUT_BIAS, traits.PARTIAL_ROTARY),
    ),
    "olmo": Family(
        architecture="OlmoForCausalLM",
        names=names.LLAMA,
        defaults={
            **_DEFAULTS,
            "vocab_size": 50304,
            "attention_bias": False,
            "clip_qkv": None,
        },
        keys={**_KEYS, "attention_bias": "query_bias", "clip_qkv": "projection_clip"},
        fixed={"norm": "layer", "norm_weight": False, "norm_eps": 1e-5},
        traits=(traits.OUTPUT_BIAS, traits.ROTARY),
    ),
    "cohere": Family(
        architecture="CohereForCausalLM",
        names=names.LLAMA,
        defaults={**_COHERE, "use_qk_norm": False},
        keys={**_COHERE_KEYS, "use_qk_norm": "query_key_norm"},
        fixed={**_COHERE_FIXED, "query_key_norm_axes": "heads"},
        traits=(traits.OUTPUT_BIAS, traits.rotary(interleaved=True)),
    ),
    "cohere2": Family(
        architecture="Cohere2ForCausalLM",
        names=names.LLAMA,
        defaults={
            **_COHERE,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        keys=_COHERE_KEYS,
        fixed=_COHERE_FIXED,
        traits=(traits.OUTPUT_BIAS, layers.COHERE2),
        neutral={
            "order_of_interleaved_layers": "local_attn_first",
            "position_embedding_type": "rope_gptj",
            "use_embedding_sharing": True,
            "use_gated_activation": True,
            "use_parallel_block": True,
        },
    ),
}
