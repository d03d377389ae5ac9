"""What `accelerator.py` has systems train: shapes of real models, in bfloat16 compute.

The counterpart of `problem.py` for a device with room: the weights are random and made in place,
since no result is compared at this size. NumPy alone.
"""

import dataclasses

import numpy as np

from .models import SHAPE as QWEN3

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
}
SHAPES = {
    "qwen3-0.6b": QWEN3,
    "llama-3.2-1b": LLAMA,
    "tiny-qwen3": {**QWEN3, **TINY},
    "tiny-llama": {**LLAMA, **TINY},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A training step of DPO: AdamW in float32, compute in bfloat16, a frozen reference run live.

    `remat` recomputes each layer in the backward pass; `microbatches` and `fused`, attention
    through cuDNN's kernel, apply to our library.
    """

    shape: str
    pairs: int
    prompt: int
    completion: int
    remat: bool = False
    microbatches: int = 1
    fused: bool = True
    precomputed: bool = False
    beta: float = 0.1
    learning_rate: float = 1e-6
    weight_decay: float = 0.01

    @property
    def vocab(self) -> int:
        """The number of token ids."""
        return int(SHAPES[self.shape]["vocab_size"])

    @property
    def tokens(self) -> int:
        """The tokens of a batch, prompts counted once."""
        return self.pairs * (self.prompt + 2 * self.completion)


def flops(case: Case) -> int:
    """The floating-point operations of a step that does nothing twice, attention's included.

    As `problem.floor_flops`, with the causal products of attention: those of each prompt with
    itself, and of each completion with its prompt and itself. What a system recomputes, or runs on
    padding and on prompts a second time, does not count as work done.
    """
    shape = SHAPES[case.shape]
    width, inner, layers = (
        int(shape[name]) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    mixed = int(shape["num_attention_heads"]) * int(shape["head_dim"])
    shared = int(shape["num_key_value_heads"]) * int(shape["head_dim"])
    weights = layers * (2 * width * (mixed + shared) + 3 * width * inner)
    seen = case.prompt * (case.prompt + 1) // 2
    seen += 2 * case.completion * case.prompt + case.completion * (case.completion + 1)
    forward = 2 * case.tokens * weights + 4 * case.pairs * seen * mixed * layers
    forward += 2 * case.pairs * 2 * case.completion * width * case.vocab
    return 4 * forward


def rows_of(case: Case) -> np.ndarray:
    """Random chosen sequences, then rejected ones, with the same prompts. int32."""
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(0, case.vocab, (case.pairs, length), dtype=np.int32)

    prompt = ids(case.prompt)
    return np.concatenate([np.concatenate([prompt, ids(case.completion)], 1) for _ in range(2)])
