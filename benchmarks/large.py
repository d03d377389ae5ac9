"""The problems of `accelerator.py`: shapes of real models, with compute in bfloat16.

The counterpart of `problem.py` for a device with much memory: the weights are random and made on
the device, since no results are compared at this size. It needs NumPy alone.
"""

import dataclasses

import numpy as np

from .models import DENSE as QWEN3

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

    `remat` recomputes each layer in the backward pass. `microbatches`, `fused` (attention through
    cuDNN's kernel) and `unroll` (code of every layer, no loop) apply to this library only.
    """

    shape: str
    pairs: int
    prompt: int
    completion: int
    remat: bool = False
    microbatches: int = 1
    fused: bool = True
    unroll: bool = False
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
        """The tokens of a batch; a prompt counts once."""
        return self.pairs * (self.prompt + 2 * self.completion)


def flops(case: Case) -> int:
    """The floating-point operations of a step that computes nothing twice, including attention.

    This is `problem.floor_flops` plus the causal products of attention: of each prompt with itself,
    and of each completion with its prompt and itself. Recomputation, and work on padding or on a
    second copy of a prompt, does not count.
    """
    shape = SHAPES[case.shape]
    width, inner, layers = (
        int(shape[name]) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    mixed = int(shape["num_attention_heads"]) * int(shape["head_dim"])
    shared = int(shape["num_key_value_heads"]) * int(shape["head_dim"])
    weights = layers * (2 * width * (mixed + shared) + 3 * width * inner)
    # The pairs of query and key under the causal mask, of one prompt and two completions.
    seen = case.prompt * (case.prompt + 1) // 2
    seen += 2 * case.completion * case.prompt + case.completion * (case.completion + 1)
    forward = 2 * case.tokens * weights + 4 * case.pairs * seen * mixed * layers
    forward += 2 * case.pairs * 2 * case.completion * width * case.vocab
    # The policy forward and backward (3 forwards), and the reference forward.
    return 4 * forward


def rows_of(case: Case) -> np.ndarray:
    """Random chosen sequences, then rejected sequences with the same prompts, int32."""
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(0, case.vocab, (case.pairs, length), dtype=np.int32)

    prompt = ids(case.prompt)
    return np.concatenate([np.concatenate([prompt, ids(case.completion)], 1) for _ in range(2)])
