"""Our decoders against `transformers` on random checkpoints of many shapes, and back; run by hand.

The two may live in different environments, so it has three parts, run one after the other:

    python -m tests.models.compare_transformers make FOLDER     # with torch and transformers
    python -m tests.models.compare_transformers ours FOLDER     # with dpo_eqx
    python -m tests.models.compare_transformers back FOLDER     # with torch and transformers

`make` writes checkpoints and their logits, `ours` compares and saves what it loaded, `back` loads
that in `transformers` and compares again. A deviation of 1e-4 fails.
"""

import sys
from pathlib import Path

import numpy as np

SMALL = {
    "vocab_size": 80,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": 128,
}
LONG = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-llama3": (
        "Llama",
        {"rope_scaling": {**LONG, "original_max_position_embeddings": 32}, "rope_theta": 5e5},
    ),
    "llama-yarn": (
        "Llama",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "head_dim": 20,
        },
    ),
    "llama-biases-tied": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 14},
    ),
    "llama-relu": ("Llama", {"hidden_act": "relu", "num_key_value_heads": 1, "rms_norm_eps": 1e-3}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 10, "tie_word_embeddings": True}),
    "mistral-endless": ("Mistral", {"sliding_window": None, "hidden_act": "gelu"}),
    "qwen2-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2-yarn": (
        "Qwen2",
        {
            "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16,
                "beta_slow": 2,
            },
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 20, "rope_theta": 1e6}),
    "qwen3-biases": (
        "Qwen3",
        {
            "head_dim": 12,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "use_sliding_window": True,
            "sliding_window": 4,
        },
    ),
    "gpt2": ("GPT2", {"n_inner": 100, "activation_function": "gelu"}),
    "gpt2-untied": (
        "GPT2",
        {"tie_word_embeddings": False, "activation_function": "relu", "scale_attn_weights": False},
    ),
    "phi": ("Phi", {"partial_rotary_factor": 0.75, "num_key_value_heads": 6}),
    "phi-norms": (
        "Phi",
        {"qk_layernorm": True, "num_key_value_heads": 3, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "phi-tied-linear": (
        "Phi",
        {
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "layer_norm_eps": 1e-2,
            "num_key_value_heads": 6,
        },
    ),
    "gemma2": ("Gemma2", {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 7}),
    "gemma2-hard-caps": (
        "Gemma2",
        {
            "head_dim": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 3,
        },
    ),
    "gemma2-no-caps": (
        "Gemma2",
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
}
GPT2 = {
    "vocab_size": 80,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 128,
}
IDS = np.random.default_rng(0).integers(0, 80, (2, 60))


def make(folder: Path) -> None:
    import torch
    import transformers

    for name, (family, settings) in CASES.items():
        sizes = GPT2 if family == "GPT2" else SMALL
        config = getattr(transformers, f"{family}Config")(**{**sizes, **settings})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(folder / name)
        np.save(folder / name / "logits.npy", _logits(model))


def ours(folder: Path) -> None:
    import jax

    from dpo_eqx import models

    worst = 0.0
    for name in CASES:
        policy = models.load(folder / name)
        logits = np.asarray(jax.vmap(policy)(IDS))
        want = np.load(folder / name / "logits.npy")
        worst = max(worst, _report(name, logits, want))
        models.save(policy, folder / "back" / name)
        np.save(folder / "back" / f"{name}.npy", logits)
    sys.exit(worst > 1e-4)


def back(folder: Path) -> None:
    import transformers

    worst = 0.0
    for name in CASES:
        path = folder / "back" / name
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True
        )
        assert not any(loading.values()), (name, loading)
        want = np.load(folder / "back" / f"{name}.npy")
        worst = max(worst, _report(name, _logits(model.eval()), want))
    sys.exit(worst > 1e-4)


def _logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def _report(name: str, got: np.ndarray, want: np.ndarray) -> float:
    deviation = float(np.abs(got - want).max())
    print(f"{name:20} off by {deviation:.1e}, logits up to {np.abs(want).max():.1f}")
    return deviation


if __name__ == "__main__":
    {"make": make, "ours": ours, "back": back}[sys.argv[1]](Path(sys.argv[2]))
