"""Where each parameter lies in a Hugging Face checkpoint: one table per family.

The tables are read both ways, by loading and by saving; nothing here touches a file.
"""

import dataclasses
from collections.abc import Mapping

# Start and stop along each axis.
Index = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """A module of a checkpoint, or a part of one, that is a module of ours.

    **Arguments:**

    - `module`: its name, `{}` standing for the layer.
    - `transposed`: whether its weight is stored as `(in, out)`.
    - `part`, `parts`: which of how many equal parts of its outputs is ours.
    """

    module: str
    transposed: bool = False
    part: int = 0
    parts: int = 1

    def tensor(self, layer: int, suffix: str) -> str:
        """The tensor's name: `suffix` is `"weight"` or `"bias"`."""
        return f"{self.module.format(layer)}.{suffix}"

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor, from that of our parameter in one layer."""
        whole = (self.parts * shape[0], *shape[1:])
        return whole[::-1] if self.transposed else whole

    def stored_index(self, index: Index, shape: tuple[int, ...]) -> Index:
        """Where in the tensor our parameter's `index` lies."""
        (start, stop), *rest = index
        offset = self.part * shape[0]
        shifted = ((start + offset, stop + offset), *rest)
        return shifted[::-1] if self.transposed else shifted


def source_of(names: Mapping[str, Source], path: str) -> tuple[Source, str]:
    """The source of the parameter at `path` such as `layers.attention.query.weight`; its suffix."""
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

# GPT-2 stores its projections as (in, out), and queries, keys and values as one of them.
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
