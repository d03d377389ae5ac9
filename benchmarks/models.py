"""Load time, compile time, step time and peak memory of decoders of 0.4 to 0.6 B active parameters.

    python -m benchmarks.models                       # everything; needs 14 GB of memory
    python -m benchmarks.models lora compile          # some parts
    python -m benchmarks.models --shape mixture full  # about 18 GB
    python -m benchmarks.models full torch --python-torch ENV/bin/python

The dense shape is Qwen3-0.6B's, the hybrid has gated delta rules in three of four layers, and the
mixture has 16 experts. The weights are random, and are first written as a checkpoint of several
files. Each row is a process of its own, so its peak resident memory covers only loading and
training. The part `torch` is `full` as a PyTorch loop with the decoder of `transformers`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from .turns import resident

VOCAB = 151936
DENSE = {
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
SHAPES = {
    "dense": DENSE,
    "hybrid": {
        **DENSE,
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    "mixture": {
        **DENSE,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 16,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}
# The sizes of the policies whose compilation is timed.
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 256,
}
SMALL_PARTS = {
    "dense": {},
    "hybrid": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "mixture": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
SHARD = 300_000_000  # Bytes, so that the checkpoint has several files.
PAIRS, PROMPT, COMPLETION = 2, 256, 128
RANK = 16
STEPS = 3


def write(folder: Path, shape: str) -> dict:
    """Writes a random checkpoint in bfloat16, the dtype of the real checkpoint."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from dpo_eqx import models

    @eqx.filter_jit
    def make(key):
        policy = models.Transformer(models.read_config(SHAPES[shape]), key=key)
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy)

    models.save(make(jax.random.key(0)), folder, max_shard_size=SHARD)
    return {}


def load(folder: Path, shape: str) -> dict:
    """The peak of resident memory while loading, above what the process had before, in GB."""
    import jax
    import jax.numpy as jnp

    from dpo_eqx import models

    jnp.zeros(1).block_until_ready()
    before = resident("VmRSS")
    policy = models.load(folder)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(policy)]
    layers = policy.config.layers
    stacked = [leaf.nbytes / layers for leaf in jax.tree.leaves(policy.layers)]
    return {
        "files": len(list(folder.glob("*.safetensors"))),
        "weights": sum(sizes) / 1e9,
        "largest tensor": max(policy.embedding.weight.nbytes, *stacked) / 1e9,
        "peak above start": resident("VmHWM") - before,
    }


def full(folder: Path, shape: str) -> dict:
    """Trains all weights in float32 by AdamW, with a live reference."""
    import jax.numpy as jnp
    import optax

    from dpo_eqx import models

    started = time.perf_counter()
    policy = models.load(folder, dtype=jnp.float32, remat=True)
    reference = models.load(folder, dtype=jnp.float32, remat=True)
    load = (time.perf_counter() - started) / 2
    return {"load": load, **_measure(policy, reference, optax.adamw(1e-6))}


def lora(folder: Path, shape: str, quantize: str | None = None) -> dict:
    """Trains adapters of rank 16 on a frozen base (the reference), in bfloat16 or quantised."""
    import jax
    import optax

    from dpo_eqx import models

    started = time.perf_counter()
    policy = models.load(folder, quantize=quantize, remat=True)
    load = time.perf_counter() - started
    policy = models.add_lora(policy, rank=RANK, key=jax.random.key(0))
    settings = {"trainable": models.lora_filter(policy), "reference_of": models.without_lora}
    return {"load": load, **_measure(policy, None, optax.adamw(1e-5), **settings)}


def compile_times(folder: Path, shape: str) -> dict:
    """Seconds to compile the step of a small policy at 8 and at 28 layers."""
    import equinox as eqx
    import jax
    import optax

    import dpo_eqx as dpx
    from dpo_eqx import losses, models

    times = {}
    for layers in (8, 28):
        sizes = {**SMALL, **SMALL_PARTS[shape], "num_hidden_layers": layers}
        config = models.read_config({**SHAPES[shape], **sizes})
        policy = models.Transformer(config, key=jax.random.key(0))
        optimizer = optax.adamw(1e-4)
        step = eqx.filter_jit(dpx.make_step(losses.dpo, optimizer))
        arguments = policy, optimizer.init(eqx.filter(policy, eqx.is_array)), _batch(512), policy
        started = time.perf_counter()
        step.lower(*arguments).compile()
        times[f"compile at {layers} layers"] = time.perf_counter() - started
    return times


def _measure(policy, reference, optimizer, **settings) -> dict:
    import equinox as eqx

    import dpo_eqx as dpx
    from dpo_eqx import losses

    trainable = settings.get("trainable", eqx.is_inexact_array)
    step = dpx.make_step(losses.dpo, optimizer, **settings)
    opt_state = optimizer.init(eqx.filter(policy, trainable))
    loaded = resident("VmHWM")

    @eqx.filter_jit(donate="all-except-first")
    def train(frozen, policy, opt_state):
        batch, reference = frozen
        return step(policy, opt_state, batch, reference)

    frozen = (_batch(VOCAB), reference)
    started = time.perf_counter()
    compiled = train.lower(frozen, policy, opt_state).compile()
    compiling = time.perf_counter() - started
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        policy, opt_state, metrics = compiled(frozen, policy, opt_state)
        losses_seen = float(metrics["loss"])
        times.append(time.perf_counter() - started)
    memory = compiled.compiled.memory_analysis()
    return {
        "compile": compiling,
        "step": min(times),
        "loss at the end": losses_seen,
        "peak after loading": loaded,
        "peak": resident("VmHWM"),
        "arguments (analysis)": memory.argument_size_in_bytes / 1e9,
        "temporaries (analysis)": memory.temp_size_in_bytes / 1e9,
        "aliased (analysis)": memory.alias_size_in_bytes / 1e9,
        "outputs (analysis)": memory.output_size_in_bytes / 1e9,
    }


def _batch(vocab: int):
    import numpy as np

    import dpo_eqx as dpx

    return dpx.PreferenceBatch(
        *(dpx.Tokens(ids, np.ones(ids.shape, bool)) for ids in pair_ids(vocab))
    )


def pair_ids(vocab: int = VOCAB) -> tuple:
    """Random ids of prompts, chosen and rejected completions."""
    import numpy as np

    rng = np.random.default_rng(0)
    widths = PROMPT, COMPLETION, COMPLETION
    return tuple(rng.integers(0, vocab, (PAIRS, width)).astype(np.int32) for width in widths)


PARTS = {
    "write": write,
    "load": load,
    "lora": lora,
    "int8": partial(lora, quantize="int8"),
    "nf4": partial(lora, quantize="nf4"),
    "full": full,
    "compile": compile_times,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="*", default=["load", "lora", "int8", "nf4", "full", "compile"]
    )
    parser.add_argument("--shape", choices=SHAPES, default="dense")
    parser.add_argument("--python-torch", metavar="PATH", help="interpreter with transformers")
    parser.add_argument("--inside", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "torch" in arguments.parts and not arguments.python_torch:
        parser.error("`torch` needs --python-torch with an interpreter that has transformers")
    if arguments.inside:
        (part,) = arguments.parts
        print(json.dumps(PARTS[part](Path(arguments.inside), arguments.shape)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in ["write", *arguments.parts]:
            command = [sys.executable, "-m", "benchmarks.models", part]
            command += ["--shape", arguments.shape, "--inside", folder + "/it"]
            if part == "torch":
                command = [arguments.python_torch, "-m", "benchmarks.peers.models_torch"]
                command += [folder + "/it"]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for name, value in json.loads(output.splitlines()[-1]).items():
                print(f"{part:8} {name:24} {value:8.2f}", flush=True)


if __name__ == "__main__":
    main()
