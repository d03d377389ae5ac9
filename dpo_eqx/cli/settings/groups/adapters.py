"""Low-rank adapters (LoRA) of a run."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFlags:
    """Low-rank adapters in place of the whole model."""

    lora_rank: int = 0
    """Train low-rank adapters of this rank in place of the model; 0 trains the model."""
    lora_alpha: float | None = None
    """The adapters are scaled by alpha / rank (default: twice the rank)."""
    lora_rslora: bool = False
    """Scale new adapters by alpha / sqrt(rank) instead (rank-stabilised)."""
    lora_dropout: float = 0.0
    """Probability of dropout of the adapters' inputs in training. It needs no `--dropout`, which is
    for the model's own."""
    lora_dora: bool = False
    """Train the lengths of the rows of adapted weights apart from their directions (DoRA)."""
    lora_target: str | None = None
    """A regular expression for the layers that get adapters, such as `attention` (default: all
    linear layers but the unembedding)."""
    lora_modules_to_save: str | None = None
    """A regular expression for embeddings, norms and the unembedding that are trained whole beside
    new adapters, such as `^(embedding|head)` (default: none)."""
    lora: str | None = None
    """Continue from the adapters in this folder, which PEFT or an earlier run wrote, in place of
    new adapters. An earlier run wrote them to `adapter/`."""
    lora_reference: Literal["base", "adapter"] | None = None
    """The reference of a run with `--lora`: the model without adapters (base), or with the adapters
    that the run starts from (adapter). It has no default."""
    quantize: Literal["int8", "nf4"] | None = None
    """Hold the linear layers of the frozen model, and of `--reference`, in 8 or 4 bits. Only
    adapters can be trained then."""
