"""The families as data: the field of `Config` for each key of `config.json`, and the defaults.

`family_keys.py` reads and writes the few keys that need more than a table. The names of the
parameters are in `tensor_names.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from .._decoder.config import Config
from . import family_keys as readers, tensor_names as names
from .rotary_keys import ROTARY_KEYS

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    **Arguments:**

    - `architecture`: the class that `transformers` loads it with.
    - `names`: the module of a checkpoint that holds each parameter.
    - `defaults`: the default of each key of its `config.json`.
    - `keys`: the field of `Config` for each key.
    - `fixed`: fields with one value for the whole family.
    - `read`: returns the remaining fields, from the keys; raises if a setting is not supported.
    - `write`: returns the remaining keys, from a `Config`.
    """

    architecture: str
    names: Mapping[str, names.Source]
    defaults: Values
    keys: Mapping[str, str]
    fixed: Values
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[Config], dict[str, Any]]

    def aliases(self) -> dict[str, str]:
        """For each other name of a key, the name in `keys`."""
        return {other: key for key, other in _ALIASES.items() if key in self.defaults}

    def reads(self) -> frozenset[str]:
        """All keys of a `config.json` that the family reads."""
        rotary = () if "rotary" in self.fixed else ROTARY_KEYS
        return frozenset({"model_type", *self.defaults, *self.aliases(), *rotary})


# GPT-2's names of keys, and the names in all other families. `transformers` reads either for GPT-2.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
}

_KEYS = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key_heads",
    "head_dim": "head_width",
    "intermediate_size": "feed_forward",
    "max_position_embeddings": "max_length",
    "hidden_act": "activation",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
    "attention_dropout": "attention_dropout",
}

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}

_QWEN = {
    **_LLAMA,
    "vocab_size": 151936,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        names=names.LLAMA,
        defaults={**_LLAMA, "attention_bias": False, "mlp_bias": False},
        keys=_KEYS,
        fixed={},
        read=readers.read_llama,
        write=readers.write_llama,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        names=names.LLAMA,
        defaults={
            **_LLAMA,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "max_position_embeddings": 4096 * 32,
            "sliding_window": 4096,
            "layer_types": None,
        },
        keys=_KEYS,
        fixed={},
        read=readers.read_mistral,
        write=readers.write_mistral,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        names=names.LLAMA,
        defaults=_QWEN,
        keys=_KEYS,
        fixed={"query_bias": True},
        read=readers.read_qwen,
        write=readers.write_qwen,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        names=names.LLAMA,
        defaults={**_QWEN, "head_dim": 128, "attention_bias": False},
        keys=_KEYS,
        fixed={"query_key_norm": True},
        read=readers.read_qwen3,
        write=readers.write_qwen3,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        names=names.GEMMA2,
        defaults={
            **{key: value for key, value in _LLAMA.items() if key != "hidden_act"},
            "vocab_size": 256000,
            "hidden_size": 2304,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "layer_types": None,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "use_bidirectional_attention": None,
        },
        keys={
            **{key: field for key, field in _KEYS.items() if key != "hidden_act"},
            "hidden_activation": "activation",
            "final_logit_softcapping": "softcap",
            "attn_logit_softcapping": "attention_softcap",
        },
        fixed={"norm_offset": 1.0, "post_norms": True},
        read=readers.read_gemma2,
        write=readers.write_gemma2,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        names=names.GPT2,
        defaults={
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
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        keys={
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
        },
        fixed={
            "norm": "layer",
            "gated": False,
            "rotary": None,
            "query_bias": True,
            "output_bias": True,
            "feed_forward_bias": True,
        },
        read=readers.read_gpt2,
        write=readers.write_gpt2,
    ),
    "phi": Family(
        architecture="PhiForCausalLM",
        names=names.PHI,
        defaults={
            **{key: value for key, value in _LLAMA.items() if key != "rms_norm_eps"},
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
            **{key: field for key, field in _KEYS.items() if key != "rms_norm_eps"},
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
        read=readers.read_phi,
        write=readers.write_phi,
    ),
}
