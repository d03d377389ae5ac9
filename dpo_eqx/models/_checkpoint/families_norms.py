"""Families with root-mean-square norms in other places than Llama's, or in other forms, as tables.

Llama and its near kin are in `families_llama.py`.
"""

from .._decoder.basic_layers import XIELU_BETA, XIELU_EPS
from . import (
    family_keys as traits,
    family_layers as layers,
    family_rotary as rotary,
    tensor_names as names,
)
from .family import DEFAULTS, KEYS, Family, without

_GEMMA = {
    **DEFAULTS,
    "vocab_size": 256000,
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "intermediate_size": 24576,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
_GEMMA2 = {
    **without(_GEMMA, "hidden_act"),
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_GLM = {
    **DEFAULTS,
    "vocab_size": 151552,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 13696,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
_OLMO2 = {
    **DEFAULTS,
    "vocab_size": 50304,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}
_ATTENTION_BIAS = {"attention_bias": "query_bias"}
_GEMMA2_KEYS = {
    **without(KEYS, "hidden_act"),
    **_ATTENTION_BIAS,
    "hidden_activation": "activation",
    "final_logit_softcapping": "softcap",
}
_GEMMA_TRAITS = (
    traits.refusing("use_bidirectional_attention"),
    traits.OUTPUT_BIAS,
    traits.GEMMA_EMBEDDING,
)
_AFTER = {"pre_norms": False, "post_norms": True, "query_key_norm": True}

NORMS = {
    "gemma": Family(
        architecture="GemmaForCausalLM",
        names=names.LLAMA,
        defaults=_GEMMA,
        keys={**KEYS, **_ATTENTION_BIAS},
        fixed={"norm_offset": 1.0},
        traits=(*_GEMMA_TRAITS, traits.GEMMA_ACTIVATION, traits.ROTARY),
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        names=names.GEMMA2,
        defaults={
            **_GEMMA2,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        keys={**_GEMMA2_KEYS, "attn_logit_softcapping": "attention_softcap"},
        fixed={"norm_offset": 1.0, "post_norms": True},
        traits=(*_GEMMA_TRAITS, traits.GEMMA2_WINDOWS, traits.QUERY_SCALAR, traits.ROTARY),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        classifier="Gemma3TextForSequenceClassification",
        names=names.GEMMA2,
        defaults={
            **_GEMMA2,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_local_base_freq": None,
            "final_logit_softcapping": None,
            # `transformers` does not apply it.
            "attn_logit_softcapping": None,
        },
        keys=_GEMMA2_KEYS,
        fixed={"norm_offset": 1.0, "post_norms": True, "query_key_norm": True},
        traits=(*_GEMMA_TRAITS, traits.window_pattern(6), traits.QUERY_SCALAR, layers.GEMMA3),
    ),
    "glm": Family(
        architecture="GlmForCausalLM",
        names=names.GLM,
        defaults=_GLM,
        keys={**KEYS, **_ATTENTION_BIAS},
        traits=(traits.rotary(partial=True, interleaved=True),),
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        names=names.GLM4,
        defaults=_GLM,
        keys={**KEYS, **_ATTENTION_BIAS},
        fixed={"post_norms": True},
        traits=(traits.rotary(partial=True, interleaved=True),),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        names=names.OLMO2,
        defaults=_OLMO2,
        keys={**KEYS, **_ATTENTION_BIAS},
        fixed={**_AFTER, "query_key_norm_axes": "all"},
        traits=(traits.OUTPUT_BIAS, traits.ROTARY),
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        names=names.OLMO2,
        defaults={
            **_OLMO2,
            "sliding_window": 4096,
            "layer_types": None,
            "sliding_window_pattern": 4,
        },
        keys={**KEYS, **_ATTENTION_BIAS},
        fixed={**_AFTER, "query_key_norm_axes": "all"},
        traits=(traits.OUTPUT_BIAS, traits.window_pattern(4), layers.OLMO3),
    ),
    "exaone4": Family(
        architecture="Exaone4ForCausalLM",
        names=names.OLMO2,
        defaults={
            **DEFAULTS,
            "vocab_size": 102400,
            "num_key_value_heads": 32,
            "intermediate_size": 16384,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "layer_types": None,
        },
        keys=KEYS,
        fixed=_AFTER,
        traits=(layers.EXAONE4,),
    ),
    "apertus": Family(
        architecture="ApertusForCausalLM",
        classifier=None,
        names=names.APERTUS,
        defaults={
            **DEFAULTS,
            "vocab_size": 131072,
            "intermediate_size": 14336,
            "max_position_embeddings": 65536,
            "hidden_act": "xielu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 12000000.0,
            "attention_bias": False,
        },
        keys={**KEYS, **_ATTENTION_BIAS},
        fixed={"query_key_norm": True, "gated": False},
        traits=(traits.OUTPUT_BIAS, rotary.APERTUS),
        neutral={"qk_norm": True},
        constants=lambda config: (
            {
                "model.layers.{}.mlp.act_fn.beta": XIELU_BETA,
                "model.layers.{}.mlp.act_fn.eps": XIELU_EPS,
            }
            if config.activation == "xielu"
            else {}
        ),
    ),
}
