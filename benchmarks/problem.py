"""The arithmetic problem that every system gets: a llama shape, token ids, a checkpoint.

It needs NumPy alone, since each system reads it in an environment of its own. `turns.py` and
`workers.py` run and time the systems.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

# Ids below this one are special to the tokenizers of some systems.
FIRST_ID = 4
END = 2
# The machine's own rate is measured by the product of two matrices of this size.
PRODUCT = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A training step of DPO: AdamW on one batch without padding, against a frozen reference.

    Every completion ends in `END`, since some systems would otherwise append it.
    """

    pairs: int = 4
    prompt: int = 128
    completion: int = 128
    vocab: int = 32000
    width: int = 256
    layers: int = 4
    heads: int = 8
    feed_forward: int = 688
    precomputed: bool = False
    microbatches: int = 1
    beta: float = 0.1
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    norm_eps: float = 1e-6
    theta: float = 1e6  # Tunix uses this value for every llama, whatever the configuration has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that define a `Problem`."""
    for field in ("pairs", "prompt", "completion", "vocab", "width", "layers", "heads"):
        parser.add_argument(f"--{field}", type=int, default=getattr(Problem(), field))
    parser.add_argument("--feed-forward", type=int, default=Problem().feed_forward)
    parser.add_argument("--reference", choices=("live", "precomputed"), default="live")


def from_arguments(arguments: argparse.Namespace) -> Problem:
    """The `Problem` that the options define."""
    names = [field.name for field in dataclasses.fields(Problem)]
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return Problem(**given, precomputed=arguments.reference == "precomputed")


def token_ids(problem: Problem) -> dict[str, np.ndarray]:
    """Random `prompt`, `chosen` and `rejected` unpadded, int32 of shape `(pairs, length)`."""
    rng = np.random.default_rng(0)

    def rows(length):
        return rng.integers(FIRST_ID, problem.vocab, (problem.pairs, length), dtype=np.int32)

    prompt = rows(problem.prompt)
    chosen, rejected = rows(problem.completion), rows(problem.completion)
    chosen[:, -1] = rejected[:, -1] = END
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def floor_flops(problem: Problem) -> int:
    """The floating-point operations of a step that computes nothing twice: a floor.

    Only products with weights count, with 2 operations for each weight and token. Prompts are
    encoded once for both completions, and only completion tokens are unembedded. The policy takes
    3 units (forward and backward), a live reference takes 1 unit (forward). The products of
    attention itself (3% more at the default shape), softmax, norms and the optimiser do not count,
    so no step can reach the floor.
    """
    layer = 4 * problem.width**2 + 3 * problem.width * problem.feed_forward
    scored = problem.pairs * 2 * problem.completion
    tokens = problem.pairs * problem.prompt + scored
    forward = 2 * (tokens * problem.layers * layer + scored * problem.width * problem.vocab)
    return forward * (3 if problem.precomputed else 4)


def hf_config(problem: Problem) -> dict:
    """The `config.json` of the shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": problem.vocab,
        "hidden_size": problem.width,
        "num_hidden_layers": problem.layers,
        "num_attention_heads": problem.heads,
        "num_key_value_heads": problem.heads,
        "head_dim": problem.width // problem.heads,
        "intermediate_size": problem.feed_forward,
        "max_position_embeddings": max(2048, problem.prompt + problem.completion),
        "rms_norm_eps": problem.norm_eps,
        "rope_theta": problem.theta,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": END,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def tensor_shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """The tensors of the checkpoint, under Hugging Face's names; a weight is `(out, in)`."""
    width, inner = problem.width, problem.feed_forward
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (problem.vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (problem.vocab, width),
    }
    for layer in range(problem.layers):
        of_layer = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
        of_layer |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        of_layer |= {"mlp.down_proj": (width, inner)}
        of_layer |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": of_layer[name] for name in of_layer}
    return shapes


def weights(problem: Problem, seed: int = 1) -> dict[str, np.ndarray]:
    """Random tensors in float32: norms are 1, all others normal with standard deviation 0.05."""
    rng = np.random.default_rng(seed)

    def tensor(shape):
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return np.float32(0.05) * rng.standard_normal(shape, np.float32)

    return {name: tensor(shape) for name, shape in tensor_shapes(problem).items()}


def write_checkpoints(problem: Problem, folder: Path) -> None:
    """Two Hugging Face folders, `policy` and `reference`, which every system starts from.

    Their weights differ: if the policy were its own reference, the loss of the first step would be
    log 2 for any model, right or wrong.
    """
    from safetensors.numpy import save_file

    for seed, name in enumerate(("policy", "reference"), start=1):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(hf_config(problem), indent=2))
        file = folder / name / "model.safetensors"
        save_file(weights(problem, seed), file, metadata={"format": "pt"})
