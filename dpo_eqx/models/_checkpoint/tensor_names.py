"""The place of each parameter in a Hugging Face checkpoint: one table per family.

Both loading and saving read these tables; nothing here touches a file.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from .._decoder.config import Config

# Start and stop along each axis.
Index = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A module of a checkpoint, or a part of one, that holds one of our modules.

    A fused module holds several of our modules. Its outputs are in blocks of equal size, and each
    block has an equal share of the first part, then one of the second, and so on.

    **Arguments:**

    - `module`: its name, with `{}` for the number of the layer.
    - `transposed`: whether its weight is stored as `(in, out)`.
    - `part`: the place of our module among the parts of a fused module.
    - `blocks`: the number of blocks, or the field of `Config` that gives it.
    - `experts`: how it holds our module if that has a leading axis of experts. With `"each"`, every
        expert has a module of its own, and a second `{}` stands for its number. With `"stacked"`,
        one parameter holds all experts, and the name of a weight has no suffix.
    - `count`: the field of `Config` that gives the number of modules with `"each"`: heads may have
        modules of their own as experts do.
    """

    module: str
    transposed: bool = False
    part: int = 0
    blocks: int | str = 1
    experts: Literal["each", "stacked"] | None = None
    count: str = "experts"

    def tensor(self, layer: int, suffix: str, expert: int = 0) -> str:
        """The tensor's name: `suffix` is `"weight"` or `"bias"`."""
        module = self.module.format(layer, expert)
        if self.experts == "stacked":
            return module if suffix == "weight" else f"{module}_{suffix}"
        return f"{module}.{suffix}"

    def tensors_in_layer(self, config: Config) -> int:
        """The number of tensors that hold the weight in one layer."""
        return getattr(config, self.count) if self.experts == "each" else 1

    def transpose(self, weight: np.ndarray) -> np.ndarray:
        """A weight in our layout from the checkpoint's, or back; biases stay as they are."""
        return weight.T if self.transposed else weight

    def block_count(self, config: Config) -> int:
        """The number of blocks in a checkpoint with this configuration."""
        return self.blocks if isinstance(self.blocks, int) else getattr(config, self.blocks)


def source_of(names: Mapping[str, Source], path: str) -> tuple[Source, str]:
    """The source and the suffix of the parameter at `path`, as `layers.attention.query.weight`."""
    module, suffix = path.rsplit(".", 1)
    return names[module], suffix


def parts_of(names: Mapping[str, Source], module: str) -> list[str]:
    """The paths of our modules that a module of the checkpoint holds, in the order of its parts."""
    paths = [path for path, source in names.items() if source.module == module]
    return sorted(paths, key=lambda path: names[path].part)


def rows_of_parts(sizes: Sequence[int], blocks: int) -> list[np.ndarray]:
    """The outputs of a fused module that belong to each of its parts, from the parts' outputs.

    ```python
    rows_of_parts([4, 2], blocks=2)  # [array([0, 1, 3, 4]), array([2, 5])]
    ```
    """
    block = sum(sizes) // blocks
    rows, start = [], 0
    for size in sizes:
        share = size // blocks
        own = np.arange(blocks)[:, None] * block + start + np.arange(share)[None, :]
        rows.append(own.reshape(-1))
        start += share
    return rows


def fused(
    *paths: str,
    module: str,
    transposed: bool = False,
    blocks: int | str = 1,
    experts: Literal["each", "stacked"] | None = None,
) -> dict[str, Source]:
    """The sources of the modules at `paths`, which are the parts of one fused module, in order."""
    return {path: Source(module, transposed, i, blocks, experts) for i, path in enumerate(paths)}


def _expert(module: str) -> Source:
    """The source of a module of experts, each of which is a module of its own."""
    return Source(module, experts="each")


_QKV = ("layers.attention.query", "layers.attention.key", "layers.attention.value")
_GATE_UP = ("layers.feed_forward.gate", "layers.feed_forward.up")

_ATTENTION = {
    "layers.attention.query": Source("model.layers.{}.self_attn.q_proj"),
    "layers.attention.key": Source("model.layers.{}.self_attn.k_proj"),
    "layers.attention.value": Source("model.layers.{}.self_attn.v_proj"),
    "embedding": Source("model.embed_tokens"),
    "head": Source("lm_head"),
    "layers.attention_norm": Source("model.layers.{}.input_layernorm"),
}

LLAMA = {
    **_ATTENTION,
    "layers.attention.output": Source("model.layers.{}.self_attn.o_proj"),
    "layers.attention.query_norm": Source("model.layers.{}.self_attn.q_norm"),
    "layers.attention.key_norm": Source("model.layers.{}.self_attn.k_norm"),
    "layers.feed_forward_norm": Source("model.layers.{}.post_attention_layernorm"),
    "layers.feed_forward.gate": Source("model.layers.{}.mlp.gate_proj"),
    "layers.feed_forward.up": Source("model.layers.{}.mlp.up_proj"),
    "layers.feed_forward.down": Source("model.layers.{}.mlp.down_proj"),
    "norm": Source("model.norm"),
}

GEMMA2 = {
    **LLAMA,
    "layers.attention_post_norm": Source("model.layers.{}.post_attention_layernorm"),
    "layers.feed_forward_norm": Source("model.layers.{}.pre_feedforward_layernorm"),
    "layers.feed_forward_post_norm": Source("model.layers.{}.post_feedforward_layernorm"),
}

_HEAD_NORMS = "model.layers.{}.self_attn.%s_layernorm.norms.{}"
STABLELM = {
    **LLAMA,
    "layers.attention.query_norm": Source(_HEAD_NORMS % "q", experts="each", count="heads"),
    "layers.attention.key_norm": Source(_HEAD_NORMS % "k", experts="each", count="key_heads"),
}

PHI = {
    **_ATTENTION,
    "layers.attention.output": Source("model.layers.{}.self_attn.dense"),
    "layers.attention.query_norm": Source("model.layers.{}.self_attn.q_layernorm"),
    "layers.attention.key_norm": Source("model.layers.{}.self_attn.k_layernorm"),
    "layers.feed_forward.up": Source("model.layers.{}.mlp.fc1"),
    "layers.feed_forward.down": Source("model.layers.{}.mlp.fc2"),
    "norm": Source("model.final_layernorm"),
}

# GPT-2 stores its projections as (in, out), with queries, keys and values fused into one.
GPT2 = {
    "embedding": Source("transformer.wte"),
    "positions": Source("transformer.wpe"),
    "layers.attention_norm": Source("transformer.h.{}.ln_1"),
    **fused(*_QKV, module="transformer.h.{}.attn.c_attn", transposed=True),
    "layers.attention.output": Source("transformer.h.{}.attn.c_proj", True),
    "layers.feed_forward_norm": Source("transformer.h.{}.ln_2"),
    "layers.feed_forward.up": Source("transformer.h.{}.mlp.c_fc", True),
    "layers.feed_forward.down": Source("transformer.h.{}.mlp.c_proj", True),
    "norm": Source("transformer.ln_f"),
    "head": Source("lm_head"),
}

# In turn the queries, the keys and the values; and the gate and what it gates.
PHI3 = {
    **LLAMA,
    **fused(*_QKV, module="model.layers.{}.self_attn.qkv_proj"),
    **fused(*_GATE_UP, module="model.layers.{}.mlp.gate_up_proj"),
}

GLM = {**LLAMA, **fused(*_GATE_UP, module="model.layers.{}.mlp.gate_up_proj")}

GLM4 = {
    **GLM,
    "layers.attention_post_norm": Source("model.layers.{}.post_self_attn_layernorm"),
    "layers.feed_forward_post_norm": Source("model.layers.{}.post_mlp_layernorm"),
}

_BEFORE = ("layers.attention_norm", "layers.feed_forward_norm")
# Norms after attention and feed-forward only, one of them under a name that Llama has for another.
OLMO2 = {
    **{path: source for path, source in LLAMA.items() if path not in _BEFORE},
    "layers.attention_post_norm": Source("model.layers.{}.post_attention_layernorm"),
    "layers.feed_forward_post_norm": Source("model.layers.{}.post_feedforward_layernorm"),
}

STARCODER2 = {
    **LLAMA,
    "layers.feed_forward.up": Source("model.layers.{}.mlp.c_fc"),
    "layers.feed_forward.down": Source("model.layers.{}.mlp.c_proj"),
}

NANOCHAT = {
    **LLAMA,
    "layers.feed_forward.up": Source("model.layers.{}.mlp.fc1"),
    "layers.feed_forward.down": Source("model.layers.{}.mlp.fc2"),
}

HUNYUAN = {
    **LLAMA,
    "layers.attention.query_norm": Source("model.layers.{}.self_attn.query_layernorm"),
    "layers.attention.key_norm": Source("model.layers.{}.self_attn.key_layernorm"),
}

APERTUS = {
    **LLAMA,
    "layers.attention_norm": Source("model.layers.{}.attention_layernorm"),
    "layers.feed_forward_norm": Source("model.layers.{}.feedforward_layernorm"),
    "layers.feed_forward.activation": Source("model.layers.{}.mlp.act_fn"),
}

# Each head has its query, its key and its value in a row.
GPT_NEOX = {
    "embedding": Source("gpt_neox.embed_in"),
    "layers.attention_norm": Source("gpt_neox.layers.{}.input_layernorm"),
    **fused(*_QKV, module="gpt_neox.layers.{}.attention.query_key_value", blocks="heads"),
    "layers.attention.output": Source("gpt_neox.layers.{}.attention.dense"),
    "layers.feed_forward_norm": Source("gpt_neox.layers.{}.post_attention_layernorm"),
    "layers.feed_forward.up": Source("gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    "layers.feed_forward.down": Source("gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "norm": Source("gpt_neox.final_layer_norm"),
    "head": Source("embed_out"),
}

GPTJ = {
    "embedding": Source("transformer.wte"),
    "layers.attention_norm": Source("transformer.h.{}.ln_1"),
    "layers.attention.query": Source("transformer.h.{}.attn.q_proj"),
    "layers.attention.key": Source("transformer.h.{}.attn.k_proj"),
    "layers.attention.value": Source("transformer.h.{}.attn.v_proj"),
    "layers.attention.output": Source("transformer.h.{}.attn.out_proj"),
    "layers.feed_forward.up": Source("transformer.h.{}.mlp.fc_in"),
    "layers.feed_forward.down": Source("transformer.h.{}.mlp.fc_out"),
    "norm": Source("transformer.ln_f"),
    "head": Source("lm_head"),
}

# It was trained on four devices; each had its part of the queries, then of the values and the keys.
CODEGEN = {
    **GPTJ,
    **fused(
        "layers.attention.query",
        "layers.attention.value",
        "layers.attention.key",
        module="transformer.h.{}.attn.qkv_proj",
        blocks=4,
    ),
}

MIXTRAL = {
    **LLAMA,
    "layers.feed_forward.router": Source("model.layers.{}.block_sparse_moe.gate"),
    "layers.feed_forward.gate": _expert("model.layers.{}.block_sparse_moe.experts.{}.w1"),
    "layers.feed_forward.up": _expert("model.layers.{}.block_sparse_moe.experts.{}.w3"),
    "layers.feed_forward.down": _expert("model.layers.{}.block_sparse_moe.experts.{}.w2"),
}

QWEN3_MOE = {
    **LLAMA,
    "layers.feed_forward.router": Source("model.layers.{}.mlp.gate"),
    "layers.feed_forward.gate": _expert("model.layers.{}.mlp.experts.{}.gate_proj"),
    "layers.feed_forward.up": _expert("model.layers.{}.mlp.experts.{}.up_proj"),
    "layers.feed_forward.down": _expert("model.layers.{}.mlp.experts.{}.down_proj"),
    # Layers without experts.
    "layers.dense_feed_forward.gate": LLAMA["layers.feed_forward.gate"],
    "layers.dense_feed_forward.up": LLAMA["layers.feed_forward.up"],
    "layers.dense_feed_forward.down": LLAMA["layers.feed_forward.down"],
}

# Gates and what they gate take turns among the outputs.
GPT_OSS = {
    **LLAMA,
    "layers.attention": Source("model.layers.{}.self_attn"),
    "layers.feed_forward.router": Source("model.layers.{}.mlp.router"),
    **fused(
        *_GATE_UP,
        module="model.layers.{}.mlp.experts.gate_up_proj",
        transposed=True,
        blocks="expert_width",
        experts="stacked",
    ),
    "layers.feed_forward.down": Source(
        "model.layers.{}.mlp.experts.down_proj", True, experts="stacked"
    ),
}
