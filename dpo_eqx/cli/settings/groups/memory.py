"""The dtypes of a run, and what trades time for memory."""

import dataclasses
from pathlib import Path
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilationFlags:
    """Compiled programs."""

    compilation_cache: str = "auto"
    """A folder for compiled programs, so that the next run need not compile them again: `auto` is
    one in the user's cache folder, `none` keeps none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryFlags(CompilationFlags):
    """Precision, memory and speed."""

    dtype: Dtype | None = None
    """Dtype of the parameters in training (default: float32 for trained parameters, as stored in
    the checkpoint for frozen parameters). Adapters are always in float32."""
    compute_dtype: Dtype | None = None
    """Dtype of the forward pass (default: the checkpoint's dtype, or `--dtype` if it is
    narrower)."""
    save_dtype: Dtype | None = None
    """Dtype of the finished model in `model/` (default: the checkpoint's dtype, or `--dtype` if it
    is narrower)."""
    remat: bool = False
    """Recompute each layer in the backward pass, which saves memory."""
    unroll: bool = False
    """Compile the code of every layer, rather than a loop over the layers. Compiling takes longer,
    and on a GPU a step takes less time."""
    fused: bool = True
    """Use the attention kernel of the GPU or the TPU, if there is one that fits."""
    reference_offload: bool = False
    """Keep the reference in the memory of the host. Each step copies it to the device, and the
    backward pass has its room."""
    optimizer_offload: bool = False
    """Keep the optimiser's state in the memory of the host between updates."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, before training, and cache them on disk."""
    buckets: int = 4
    """Number of widths that prompts are padded to, and completions likewise. Fewer widths compile
    less and pad more."""
    pack: bool = False
    """Write several pairs or completions into each row of a batch, which leaves almost no padding.
    A step then has about `--batch-size` of them, and one shape."""
    pack_length: int | None = None
    """Number of tokens in a packed row, at least as many as the longest prompt with all its
    completions (default: chosen from the data)."""
    cache: Path | None = None
    """A folder for tokens and reference log-probabilities (default: the user's cache folder, for
    data that does not fit in memory)."""
