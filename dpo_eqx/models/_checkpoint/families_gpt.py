"""GPT-2, GPT-J, CodeGen and GPT-NeoX, as tables.

Newer families with layer norms are in `families_layer_norm.py`.
"""

from . import family_keys as traits, family_rotary as rotary, tensor_names as names
from .family import DEFAULTS, KEYS, Family, without

_GPT2 = {
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
_GPT2_KEYS = {
    "vocab_size": "vocab",
    "n_embd": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "n_inner": "feed_forward",
    "n_positions": "max_length",
    "activation_function": "activation",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tied",
    "resid_pdrop": "residual_dropout",
    "embd_pdrop": "embedding_dropout",
    "attn_pdrop": "attention_dropout",
}
_GPTJ = {
    **_GPT2,
    "vocab_size": 50400,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "n_positions": 2048,
    "rotary_dim": 64,
    "tie_word_embeddings": False,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_GPTJ_FIXED = {
    "norm": "layer",
    "gated": False,
    "parallel": True,
    "feed_forward_bias": True,
    "unembedding_bias": True,
}
_GPTJ_NEUTRAL = {"rotary": True, "scale_attn_weights": True}

GPTS = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        names=names.GPT2,
        defaults={
            **_GPT2,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        keys={**_GPT2_KEYS, "scale_attn_by_inverse_layer_idx": "attention_scale_by_layer"},
        fixed={
            "norm": "layer",
            "gated": False,
            "rotary": None,
            "query_bias": True,
            "output_bias": True,
            "feed_forward_bias": True,
        },
        traits=(
            traits.refusing("add_cross_attention"),
            traits.GPT2_SCALE,
        ),
        rotary_keys=(),
    ),
    "gptj": Family(
        architecture="GPTJForCausalLM",
        names=names.GPTJ,
        defaults=_GPTJ,
        keys=_GPT2_KEYS,
        fixed=_GPTJ_FIXED,
        traits=(rotary.GPTJ,),
        rotary_keys=(),
        neutral=_GPTJ_NEUTRAL,
    ),
    "codegen": Family(
        architecture="CodeGenForCausalLM",
        classifier=None,
        names=names.CODEGEN,
        defaults=_GPTJ,
        keys=_GPT2_KEYS,
        fixed=_GPTJ_FIXED,
        # Queries, keys and values are in four blocks.
        traits=(rotary.GPTJ, traits.multiple_of(4, "n_embd")),
        rotary_keys=(),
        neutral=_GPTJ_NEUTRAL,
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        names=names.GPT_NEOX,
        defaults={
            **without(DEFAULTS, "rms_norm_eps", "num_key_value_heads", "head_dim"),
            "vocab_size": 50432,
            "hidden_size": 6144,
            "num_hidden_layers": 44,
            "num_attention_heads": 64,
            "intermediate_size": 24576,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "hidden_dropout": 0.0,
            "attention_bias": True,
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000.0,
            # `transformers` does not read it.
            "num_key_value_heads": None,
        },
        keys={
            **without(KEYS, "rms_norm_eps", "num_key_value_heads", "head_dim"),
            "layer_norm_eps": "norm_eps",
            "hidden_dropout": "residual_dropout",
            "attention_bias": "query_bias",
            "use_parallel_residual": "parallel",
        },
        fixed={"norm": "layer", "gated": False, "parallel_norms": True, "feed_forward_bias": True},
        traits=(
            traits.OUTPUT_BIAS,
            traits.same_for_number("hidden_dropout", "embedding_dropout"),
            rotary.GPT_NEOX,
        ),
    ),
}
