"""The one arithmetic problem that every system is given: a llama shape, token ids, a checkpoint.

NumPy alone, since each system reads it in an environment of its own; how they are run and timed
is in `turns.py` and `workers.py`.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

# Ids below this one are special to the tokenizers of some systems.
FIRST_ID = 4
END = 2
# What the machine's own rate is measured with: the product of two matrices of this size.
PRODUCT = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A training step of DPO: AdamW on one batch without padding, against a frozen reference.

    Every completion ends in `END`, which some systems would append otherwise.
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
    theta: float = 1e6  # the one that Tunix takes for every llama, whatever its configuration says


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a script that make a `Problem`."""
    for field in ("pairs", "prompt", "completion", "vocab", "width", "layers", "heads"):
        parser.add_argument(f"--{field}", type=int, default=getattr(Problem(), field))
    parser.add_argument("--feed-forward", type=int, default=Problem().feed_forward)
    parser.add_argument("--reference", choices=("live", "precomputed"), default="live")


def from_arguments(arguments: argparse.Namespace) -> Problem:
    """The `Problem` that the options ask for."""
    names = [field.name for field in dataclasses.fields(Problem)]
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return Problem(**given, precomputed=arguments.reference == "precomputed")


def token_ids(problem: Problem) -> dict[str, np.ndarray]:
    """Random `prompt`, `chosen` and `rejected`, without padding. Shape `(pairs, length)`, int32."""
    rng = np.random.default_rng(0)

    def rows(length):
        return rng.integers(FIRST_ID, problem.vocab, (problem.pairs, length), dtype=np.int32)

    prompt = rows(problem.prompt)
    chosen, rejected = rows(problem.completion), rows(problem.completion)
    chosen[:, -1] = rejected[:, -1] = END
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def floor_flops(problem: Problem) -> int:
    """The floating-point operations of a step that does nothing twice.

    Products with weights only, 2 for each weight and token: prompts encoded once for both
    completions, the unembedding on completion tokens alone, forward and backward (3 units) for the
    policy, forward (1 unit) for a reference that is run. Left out are attention's own products
    (3% more at the default shape), softmax, norms and the optimiser, so that no step can reach it.
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
    """Random tensors in float32: norms of 1, everything else normal of deviation 0.05."""
    rng = np.random.default_rng(seed)

    def tensor(shape):
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return np.float32(0.05) * rng.standard_normal(shape, np.float32)

    return {name: tensor(shape) for name, shape in tensor_shapes(problem).items()}


def write_checkpoints(problem: Problem, folder: Path) -> None:
    """Two Hugging Face folders, `policy` and `reference`, which every system starts from.

    Their weights differ: the loss of the first step would be log 2 whatever the model did, if the
    policy were its own reference.
    """
    from safetensors.numpy import save_file

    for seed, name in enumerate(("policy", "reference"), start=1):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(hf_config(problem), indent=2))
        file = folder / name / "model.safetensors"
        save_file(weights(problem, seed), file, metadata={"format": "pt"})
