"""The place of each parameter in a Hugging Face checkpoint: one table per family.

Both loading and saving read these tables; nothing here touches a file.
"""

import dataclasses
from collections.abc import Mapping

# Start and stop along each axis.
Index = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A module of a checkpoint, or a part of one, that holds one of our modules.

    **Arguments:**

    - `module`: its name, with `{}` for the number of the layer.
    - `transposed`: whether its weight is stored as `(in, out)`.
    - `part`, `parts`: our module is the part number `part` of `parts` equal parts of its outputs.
    """

    module: str
    transposed: bool = False
    part: int = 0
    parts: int = 1

    def tensor(self, layer: int, suffix: str) -> str:
        """The tensor's name: `suffix` is `"weight"` or `"bias"`."""
        return f"{self.module.format(layer)}.{suffix}"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor, from the shape of our parameter in one layer."""
        full_shape = (self.parts * shape[0], *shape[1:])
        return full_shape[::-1] if self.transposed else full_shape

    def stored_index(self, index: Index, shape: tuple[int, ...]) -> Index:
        """The index into the tensor for an `index` into our parameter."""
        (start, stop), *other_axes = index
        offset = self.part * shape[0]
        shifted = ((start + offset, stop + offset), *other_axes)
        return shifted[::-1] if self.transposed else shifted


def source_of(names: Mapping[str, Source], path: str) -> tuple[Source, str]:
    """The source and the suffix of the parameter at `path`, as `layers.attention.query.weight`."""
    module, suffix = path.rsplit(".", 1)
    return names[module], suffix


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
    "layers.attention.query": Source("transformer.h.{}.attn.c_attn", True, 0, 3),
    "layers.attention.key": Source("transformer.h.{}.attn.c_attn", True, 1, 3),
    "layers.attention.value": Source("transformer.h.{}.attn.c_attn", True, 2, 3),
    "layers.attention.output": Source("transformer.h.{}.attn.c_proj", True),
    "layers.feed_forward_norm": Source("transformer.h.{}.ln_2"),
    "layers.feed_forward.up": Source("transformer.h.{}.mlp.c_fc", True),
    "layers.feed_forward.down": Source("transformer.h.{}.mlp.c_proj", True),
    "norm": Source("transformer.ln_f"),
    "head": Source("lm_head"),
}
