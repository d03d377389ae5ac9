"""Families with layers of two kinds, as tables: attention, and what keeps a state in its place.

Families whose layers all have attention are in the other modules of tables.
"""

from collections.abc import Sequence
from typing import Any

from .._decoder.config import Config
from .._decoder.recurrence import Recurrence
from . import family_keys as traits
from .family import DEFAULTS, KEYS, Family, Trait, Values, without
from .rotary_keys import read_rotary, write_rotary
from .tensor_names import LLAMA, Source, fused

CONVOLUTION, DELTA = "conv", "linear_attention"


def read_recurrent(types: Sequence[str], recurrent: str, values: Values) -> tuple[bool, ...]:
    """Whether each layer is recurrent, from its type; `recurrent` is the type of those that are."""
    unknown = sorted(set(types) - {recurrent, traits.FULL})
    if unknown:
        raise ValueError(
            f"`layer_types` may hold {recurrent!r} and {traits.FULL!r}; got {unknown} too, which "
            "is not supported."
        )
    if len(types) != values["num_hidden_layers"]:
        raise ValueError(
            f"`layer_types` must have one entry per layer, and `num_hidden_layers` says "
            f"{values['num_hidden_layers']}; got {len(types)}."
        )
    return tuple(kind == recurrent for kind in types)


def types_of(config: Config, recurrent: str) -> list[str]:
    """The type of each layer."""
    return [recurrent if own == "recurrence" else traits.FULL for own in config.mixers]


def read_lfm2(values: Values) -> dict[str, Any]:
    """LFM2: which layers are convolutions, their sizes, and the adjusted size of feed-forward."""
    types, indices = values["layer_types"], values["full_attn_idxs"]
    layers = range(values["num_hidden_layers"])
    if types is None:
        attends = layers if indices is None else indices
        types = [traits.FULL if layer in attends else CONVOLUTION for layer in layers]
    kernel, bias = values["conv_L_cache"], values["conv_bias"]
    tied = values["tie_embedding"]
    return {
        "recurrence": Recurrence(kind="convolution", kernel=kernel, bias=bias),
        "recurrent": read_recurrent(types, CONVOLUTION, values),
        "feed_forward": adjusted_size(values),
        "tied": values["tie_word_embeddings"] if tied is None else tied,
    }


def adjusted_size(values: Values) -> int:
    """LFM2's inner width of feed-forward: two thirds of the stated size, scaled and rounded up."""
    stated = values["block_ff_dim"]
    size = values["intermediate_size"] if stated is None else stated
    if not values["block_auto_adjust_ff_dim"]:
        return size
    size, factor = int(2 * size / 3), values["block_ffn_dim_multiplier"]
    if factor is None:
        return size
    multiple = values["block_multiple_of"]
    return -(-int(factor * size) // multiple) * multiple


def write_lfm2(config: Config) -> dict[str, Any]:
    """The inverse of `read_lfm2`; the size of feed-forward is written as it is."""
    recurrence = config.recurrence
    if recurrence is None:
        return {}
    return {
        "layer_types": types_of(config, CONVOLUTION),
        # For older programs, which do not know `layer_types`.
        "full_attn_idxs": [i for i, own in enumerate(config.mixers) if own == "attention"],
        "conv_L_cache": recurrence.kernel,
        "conv_bias": recurrence.bias,
        "block_auto_adjust_ff_dim": False,
    }


LFM2 = Trait(read_lfm2, write_lfm2)

# The key of each size of the gated delta rule.
_SIZES = {
    "kernel": "linear_conv_kernel_dim",
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_width": "linear_key_head_dim",
    "value_width": "linear_value_head_dim",
}


def read_qwen3_5(values: Values) -> dict[str, Any]:
    """Qwen3.5: which layers have the gated delta rule, and its sizes."""
    interval, types = values["full_attention_interval"], values["layer_types"]
    if types is None:
        layers = range(1, values["num_hidden_layers"] + 1)
        types = [DELTA if layer % interval else traits.FULL for layer in layers]
    heads, key_heads = values["linear_num_value_heads"], values["linear_num_key_heads"]
    if heads % key_heads:
        raise ValueError(
            "`linear_num_value_heads` must be a multiple of `linear_num_key_heads`; got "
            f"{heads} and {key_heads}."
        )
    sizes = {size: values[key] for size, key in _SIZES.items()}
    return {
        "recurrence": Recurrence(kind="delta", **sizes),
        "recurrent": read_recurrent(types, DELTA, values),
    }


def write_qwen3_5(config: Config) -> dict[str, Any]:
    """The inverse of `read_qwen3_5`."""
    recurrence = config.recurrence
    if recurrence is None:
        return {}
    sizes = {key: getattr(recurrence, size) for size, key in _SIZES.items()}
    return {"layer_types": types_of(config, DELTA), **sizes}


QWEN3_5 = Trait(read_qwen3_5, write_qwen3_5)


def read_qwen3_5_rotary(values: Values) -> dict[str, Any]:
    """Qwen3.5: rotary embeddings by time, height and width, which are one position in a text."""
    about_images = ("mrope_section", "mrope_interleaved")
    plain = {
        name: without(values[name], *about_images)
        for name in ("rope_scaling", "rope_parameters")
        if values.get(name)
    }
    return {"rotary": read_rotary({**values, **plain})}


QWEN3_5_ROTARY = Trait(
    read_qwen3_5_rotary, lambda config: write_rotary(config.rotary, partial=True)
)

_LFM2_NAMES = {
    "embedding": Source("model.embed_tokens"),
    "layers.attention_norm": Source("model.layers.{}.operator_norm"),
    "layers.attention.query": Source("model.layers.{}.self_attn.q_proj"),
    "layers.attention.key": Source("model.layers.{}.self_attn.k_proj"),
    "layers.attention.value": Source("model.layers.{}.self_attn.v_proj"),
    "layers.attention.output": Source("model.layers.{}.self_attn.out_proj"),
    "layers.attention.query_norm": Source("model.layers.{}.self_attn.q_layernorm"),
    "layers.attention.key_norm": Source("model.layers.{}.self_attn.k_layernorm"),
    **fused(
        "layers.recurrence.input_gate",
        "layers.recurrence.output_gate",
        "layers.recurrence.value",
        module="model.layers.{}.conv.in_proj",
    ),
    "layers.recurrence.filter": Source("model.layers.{}.conv.conv"),
    "layers.recurrence.output": Source("model.layers.{}.conv.out_proj"),
    "layers.feed_forward_norm": Source("model.layers.{}.ffn_norm"),
    "layers.feed_forward.gate": Source("model.layers.{}.feed_forward.w1"),
    "layers.feed_forward.up": Source("model.layers.{}.feed_forward.w3"),
    "layers.feed_forward.down": Source("model.layers.{}.feed_forward.w2"),
    "norm": Source("model.embedding_norm"),
    "head": Source("lm_head"),
}

_DELTA = "model.layers.{}.linear_attn"
_QWEN3_5_NAMES = {
    **LLAMA,
    # Each head has its query and the gate of its output in a row.
    **fused(
        "layers.attention.query",
        "layers.attention.gate",
        module="model.layers.{}.self_attn.q_proj",
        blocks="heads",
    ),
    **fused(
        "layers.recurrence.query",
        "layers.recurrence.key",
        "layers.recurrence.value",
        module=f"{_DELTA}.in_proj_qkv",
    ),
    **fused(
        "layers.recurrence.query_filter",
        "layers.recurrence.key_filter",
        "layers.recurrence.value_filter",
        module=f"{_DELTA}.conv1d",
    ),
    "layers.recurrence.gate": Source(f"{_DELTA}.in_proj_z"),
    "layers.recurrence.rate": Source(f"{_DELTA}.in_proj_b"),
    "layers.recurrence.decay": Source(f"{_DELTA}.in_proj_a"),
    "layers.recurrence": Source(_DELTA),
    "layers.recurrence.norm": Source(f"{_DELTA}.norm"),
    "layers.recurrence.output": Source(f"{_DELTA}.out_proj"),
}

HYBRIDS = {
    "lfm2": Family(
        architecture="Lfm2ForCausalLM",
        classifier=None,
        names=_LFM2_NAMES,
        defaults={
            **without(DEFAULTS, "hidden_act", "rms_norm_eps", "attention_dropout"),
            "vocab_size": 65536,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "num_key_value_heads": 8,
            "max_position_embeddings": 128000,
            "norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "tie_embedding": None,
            "rope_theta": 1000000.0,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_ff_dim": None,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "full_attn_idxs": None,
            "layer_types": None,
        },
        keys={
            **without(KEYS, "hidden_act", "rms_norm_eps", "attention_dropout"),
            "norm_eps": "norm_eps",
        },
        fixed={"activation": "silu", "query_key_norm": True},
        traits=(LFM2, traits.ROTARY),
        neutral={
            **dict.fromkeys(("block_dim", "block_mlp_init_scale", "block_norm_eps"), ...),
            **dict.fromkeys(("block_out_init_scale", "block_use_xavier_init"), ...),
            **dict.fromkeys(("conv_dim", "conv_dim_out", "conv_use_xavier_init", "theta"), ...),
            "block_use_swiglu": True,
            "use_pos_enc": True,
        },
    ),
    "qwen3_5_text": Family(
        architecture="Qwen3_5ForCausalLM",
        classifier="Qwen3_5TextForSequenceClassification",
        names=_QWEN3_5_NAMES,
        defaults={
            **DEFAULTS,
            "vocab_size": 248320,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "intermediate_size": 12288,
            "max_position_embeddings": 32768,
            "head_dim": 256,
            "attention_bias": False,
            "partial_rotary_factor": 0.25,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "full_attention_interval": 4,
            "layer_types": None,
        },
        keys={**KEYS, "attention_bias": "query_bias"},
        fixed={"query_key_norm": True, "norm_offset": 1.0, "attention_gate": True},
        traits=(QWEN3_5, QWEN3_5_ROTARY, traits.OUTPUT_BIAS),
        neutral={
            "attn_output_gate": True,
            "mlp_only_layers": [],
            # The head that predicts several tokens is left out; states are in float32 or wider.
            **dict.fromkeys(("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"), ...),
            "mamba_ssm_dtype": "float32",
        },
        heads=r"^mtp\.",
    ),
}
